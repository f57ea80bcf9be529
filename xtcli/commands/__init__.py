"""One module a command: parse, call, print. `xtcli.cli` imports a module when its command is called."""
