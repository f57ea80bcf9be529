"""`xt generate`: continue, fill or map texts with a trained model."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xtcli.commands.given import again, given, unused
from xtcli.commands.options import Json, next_command
from xtcli.commands.places import device_of
from xtcli.commands.texts import prompts_of, second_text, tokenizer_of
from xtcli.errors import did_you_mean, refuse
from xtcli.objectives.words import count

if TYPE_CHECKING:
    import torch

    from xtcli.generate.label import Said
    from xtcli.generate.options import Answer, Options

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TASKS = {
    "continue": "continues the prompt",
    "map": "maps the prompt",
    "fill": "fills masks",
    "label": "labels the prompt, or answers from its context",
}
SEEING = {"map": "describes images", "label": "labels images"}
READ = {"ckpt", "prompt", "prompt_file", "image", "fill_top", "tokenizer", "device", "dtype", "int8", "as_json"}
"""Parameters that are read whatever the task."""
LENS = 4
"""Alternatives that --lens shows for each token."""


def command(
    ctx: typer.Context,
    ckpt: Annotated[str, typer.Option(help="A run, or a checkpoint folder.", show_default=False)],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to continue, map or fill; may be repeated.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file that is one prompt, without its last line end; may be repeated. Without any prompt, "
            "standard input is read in the same way.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="An image to label or describe, in the place of a prompt; may be repeated.", show_default=False
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="For models that read two texts: the second one, or the context of a question; a text or a file.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens of a text, at most.")] = 200,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Below 1 likely tokens are favoured more, 0 takes the likeliest each time.",
            show_default="0.8; encoder-decoders: 0",
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens.", show_default=False)] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw among the likeliest tokens that together have this probability.", show_default="0.95"),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Draw among tokens at least this many times as likely as the likeliest.", show_default="0, all"
        ),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that the text already has become less likely.")
    ] = 1.0,
    beams: Annotated[int, typer.Option(help="Search for the likeliest text with this many beams.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="With beams: above 0 favours long texts, below 0 short.")] = 1.0,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Texts for each prompt.")] = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="End a text before this string; may be repeated. A line end is $'\\n' in most shells.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Start of the draws.", show_default="drawn and shown")] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print while writing.", show_default="yes on a terminal"),
    ] = None,
    fill_top: Annotated[int, typer.Option(help="Guesses for each mask, labels for each text.")] = 5,
    past_context: Annotated[
        bool, typer.Option("--past-context", help="Let texts grow beyond the context that the preset plans for.")
    ] = False,
    lens: Annotated[
        bool, typer.Option("--lens", help="Show each token's probability and the likeliest alternatives.")
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer.json, or a folder with one.", show_default="the checkpoint's"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...; auto takes the fastest.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights: fp32, bf16 or fp16.", show_default="as stored")
    ] = None,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Round the weights of linear layers to 8 bits, so that less is read for a token."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Continue a text, fill its masks, map it to another or label it, as the model's structure allows.

    Decoders continue the prompt, encoders fill each [MASK] in it, encoder-decoders answer it.

    Models with heads for labels print those with their probabilities, or the answer that they find in --context.

    Their prompts may also be JSON lines with the columns of the training data.

    Models that read images label or describe --image.

    Standard output is the text alone; device, seed and speed go to standard error.
    """
    from xtcli.generate.options import Options
    from xtcli.generate.sampling import Sampling

    if dtype is not None and dtype not in DTYPES:
        raise refuse(f"'{dtype}' is no type of weights", did_you_mean(dtype, DTYPES), place="--dtype")
    chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    settings: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    # Built before anything is loaded, so that impossible values are refused at once.
    drawn = Sampling(**settings, repetition_penalty=repetition_penalty)
    greedy = Sampling(temperature=0, repetition_penalty=repetition_penalty)
    wanted = Options(
        max_tokens=max_tokens,
        sampling=drawn if settings else greedy if beams > 1 else None,
        samples=samples,
        beams=beams,
        length_penalty=length_penalty,
        stop=tuple(stop or ()),
        seed=seed,
        fill_top=fill_top,
        lens=LENS if lens else 0,
        past_context=past_context,
    )
    if image:
        generation = _Generation(ctx, ckpt, tokenizer, device, dtype, int8)
        for name, value in (("--prompt", prompt), ("--prompt-file", prompt_file), ("--context", context)):
            if value:
                raise refuse("has no place beside --image", "leave one of them out", place=name)
        generation.see([str(file) for file in image], wanted, (drawn, greedy), stream, as_json)
        return
    prompts = prompts_of(prompt or [], prompt_file or [])
    generation = _Generation(ctx, ckpt, tokenizer, device, dtype, int8)
    if generation.sees:
        raise refuse("the model reads images", "give one with --image FILE", place="--prompt")
    if generation.looks_through(prompts):
        if context is not None:
            raise refuse("is for models that read two texts", "leave it out", place="--context")
        generation.detect(prompts, fill_top, as_json)
    elif generation.task == "label":
        generation.label(prompts, second_text(context), fill_top, as_json)
    elif context is not None:
        raise refuse("is for models that label texts", f"this one {TASKS[generation.task]}", place="--context")
    else:
        generation.run(prompts, wanted, (drawn, greedy), stream, as_json)


class _Generation:
    """A model that is loaded, and what is said about its texts."""

    def __init__(
        self, ctx: typer.Context, ckpt: str, tokenizer: Path | None, device: str, dtype: str | None, int8: bool
    ) -> None:
        import torch

        from xtcli import model
        from xtcli.config.library import RECORDED
        from xtcli.config.preset import load_preset
        from xtcli.generate.engine import task_of
        from xtcli.generate.label import labels_texts
        from xtcli.generate.pictures import sees
        from xtcli.parts.int8 import quantise

        self.ctx = ctx
        place = device_of(device)
        self.folder = model.find_checkpoint(ckpt)
        self.model = model.load_folder(self.folder, place, getattr(torch, DTYPES[dtype]) if dtype else None)
        self.tokenizer: Any = tokenizer_of(self.folder, tokenizer) if self.model.reads_text else None
        self.preset = load_preset(self.folder / RECORDED).preset
        self.sees = sees(self.model)
        self.task = "label" if labels_texts(self.model, self.preset) else task_of(self.model)
        kind = next((name for name, dtype in DTYPES.items() if str(self.model.dtype) == f"torch.{dtype}"), "mixed")
        parameters = model.count(self.model)
        if int8:
            kind = f"{kind} with {count(quantise(self.model), 'layer')} in 8 bits"
        self.facts = {"checkpoint": str(self.folder), "device": str(place), "dtype": kind}
        threads = count(torch.get_num_threads(), "CPU thread")
        name = torch.cuda.get_device_name(place) if place.type == "cuda" else threads
        where = "mps" if place.type == "mps" else f"{place} ({name})"
        talk(f"{self.folder}: {parameters:,} parameters, {kind}, on {where}; {self.does()}")

    def does(self) -> str:
        """What the model does, in words."""
        return (SEEING if self.sees else TASKS)[self.task]

    def see(
        self, files: list[str], options: Options, choices: tuple[Any, Any], stream: bool | None, as_json: bool
    ) -> None:
        """Label or describe images, print, and say what is useful next."""
        from xtcli.generate.pictures import label_images, read, reader_of

        if not self.sees:
            raise refuse("is for models that read images", f"this one {self.does()}", place="--image")
        reader = reader_of(self.model, self.preset)
        if self.task == "label":
            names = getattr(self.preset.objective, "labels", None)
            self.say(label_images(self.model, reader, names, files), options.fill_top, as_json)
        else:
            self.run(files, options, choices, stream, as_json, read(reader, files))

    def run(
        self,
        prompts: list[str],
        options: Options,
        choices: tuple[Any, Any],
        stream: bool | None,
        as_json: bool,
        images: torch.Tensor | None = None,
    ) -> None:
        """Generate, print, and say what is useful next; `images` are what the prompts name."""
        from dataclasses import replace

        import torch

        from xtcli.generate import show
        from xtcli.generate.engine import generate
        from xtcli.generate.sampling import draw_seed

        show.use_utf8()
        if self.task == "fill":
            options = replace(options, samples=1)
        if options.sampling is None:
            options = replace(options, sampling=choices[self.task == "map"])
        assert options.sampling is not None
        if self.task != "fill" and not options.sampling.greedy:
            options = replace(options, seed=draw_seed() if options.seed is None else options.seed)
            talk(f"seed: {options.seed}")
        live = not as_json and self.task != "fill" and (sys.stdout.isatty() if stream is None else stream)
        rows = len(prompts) * options.samples
        stage = show.Stage(rows, lambda row: self._head(prompts, options.samples, row), sys.stdout)
        try:
            answer = generate(self.model, self.tokenizer, prompts, options, stage.hear if live else None, images)
        except torch.OutOfMemoryError:
            remedy = "give fewer prompts or samples, a smaller --max-tokens or a shorter --dtype"
            raise refuse(f"{self.facts['device']} has too little memory for {rows} texts", remedy) from None
        if as_json:
            print(json.dumps(show.document(answer, self.tokenizer, self.facts), ensure_ascii=False, indent=1))
        elif not live:
            show.whole(answer, stage)
        if not as_json:
            for row in answer.written if options.lens else ():
                show.lens(row, self.tokenizer)
        self._report(answer, options, prompts)

    def looks_through(self, prompts: list[str]) -> bool:
        """Whether the tokens of the prompts are labelled as replaced or original."""
        from xtcli.generate.detect import detects

        found = detects(self.model, self.tokenizer, prompts)
        if found and self.task == "fill":
            talk("the prompt has no mask to fill: telling which tokens look replaced")
        return found

    def label(self, prompts: list[str], second: str | None, top: int, as_json: bool) -> None:
        """Label the prompts, print, and say what is useful next."""
        from xtcli.generate.label import label

        self.say(label(self.model, self.tokenizer, self.preset, prompts, second), top, as_json)

    def detect(self, prompts: list[str], top: int, as_json: bool) -> None:
        """Label the tokens of the prompts as replaced or original, and print."""
        from xtcli.generate.detect import detect

        self.say(detect(self.model, self.tokenizer, prompts), top, as_json)

    def say(self, answer: Said, top: int, as_json: bool) -> None:
        """Print labels, and say what is useful next."""
        from xtcli.generate import said, show

        show.use_utf8()
        if as_json:
            print(json.dumps(said.document(answer, self.facts), ensure_ascii=False, indent=1))
        else:
            for line in said.lines(answer, top):
                print(line)
        if idle := unused(self.ctx, {"context", *READ}):
            talk(f"labelling makes no use of {', '.join(idle)}")
        for note in said.notes(answer):
            talk(note)
        next_command(f"xt inspect {shlex.quote(str(self.folder))}" if as_json else f"{again(self.ctx)} --json")

    def _head(self, prompts: list[str], samples: int, row: int) -> None:
        """Before a text: which it is, where there are several; on a terminal the prompt that it goes on from."""
        from xtcli.generate.show import visible

        number, sample = divmod(row, samples)
        names = [f"prompt {number + 1}"] * (len(prompts) > 1) + [f"sample {sample + 1}"] * (samples > 1)
        if names:
            talk(f"--- {', '.join(names)}")
        if self.task == "continue" and sys.stdout.isatty() and sys.stderr.isatty():
            typer.secho(visible(prompts[number]), bold=True, nl=False, err=True)

    def _report(self, answer: Answer, options: Options, prompts: list[str]) -> None:
        from xtcli.generate import show

        if answer.task == "fill" and (idle := unused(self.ctx, {"past_context", *READ})):
            talk(f"filling masks makes no use of {', '.join(idle)}")
        for note in (*answer.notes, *show.ends(answer)):
            talk(note)
        talk(show.speeds(answer.timing))
        if answer.seed is not None and "seed" not in given(self.ctx):
            next_command(f"{again(self.ctx)} --seed {answer.seed}")
        elif answer.task != "fill" and options.beams == 1 and not options.lens:
            next_command(f"{again(self.ctx)} --lens")
        else:
            next_command(f"xt inspect {shlex.quote(str(self.folder))}")


def talk(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)
