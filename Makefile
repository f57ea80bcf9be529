PYTHON ?= python3

.PHONY: check fix test schema

check:  ## format, lint and types; changes nothing
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

fix:  ## format and repair what ruff can repair
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

test:
	$(PYTHON) -m pytest

schema:  ## presets/schema.json from the code
	$(PYTHON) -m xtcli inspect --schema > presets/schema.json.new
	mv presets/schema.json.new presets/schema.json
