"""`etchat`: the command line. Arguments in, answers out; the work is done elsewhere and imported when it is needed."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from etchat_hf import __version__
from etchat_hf.conversion.cli import convert
from etchat_hf.data.cli import compress, data_app, pack
from etchat_hf.evaluation.cli import app as evaluate_app
from etchat_hf.evaluation.infer_cli import app as infer_app

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
DTYPES = ("auto", "float32", "float16", "bfloat16")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"etchat_hf {__version__}")
        raise typer.Exit


@app.callback()
def etchat(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Ask "when?" of a video and get seconds back: E.T. Chat for the Hugging Face ecosystem."""


class ManyTimes(TyperCommand):
    """Lets `--src 1.2 3` stand for `--src 1.2 --src 3`: times belong together, as in an annotation's list."""

    def parse_args(self, ctx, args: list[str]):
        spread, in_times = [], False
        for arg in args:
            if in_times and _is_number(arg):
                spread += ["--src"] if spread[-1] != "--src" else []
            else:
                in_times = arg == "--src"
            spread.append(arg)
        return super().parse_args(ctx, spread)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@app.command(cls=ManyTimes)
def ask(
    video: Annotated[str, typer.Argument(help="Video or image: a file or a URL.")],
    questions: Annotated[
        list[str] | None,
        typer.Argument(help="What to ask, each by itself; write <vid> where a time of --src belongs."),
    ] = None,
    *,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a converted checkpoint; default: the bundled toy.")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames sampled per second; default: as the model was trained.")
    ] = None,
    max_frames: Annotated[int | None, typer.Option(help="Sample more sparsely to stay within so many frames.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 2048,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}; auto: as stored.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:0; default: a GPU where there is one.")
    ] = None,
    src: Annotated[list[float] | None, typer.Option(help="Seconds of each <vid> of the questions, in order.")] = None,
    window: Annotated[float | None, typer.Option(help="Ask of windows of so many seconds, in one batch.")] = None,
    overlap: Annotated[float, typer.Option(help="Seconds that neighbouring windows share.")] = 0.0,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            help="One conversation: the questions, then further ones from standard input, a line each.",
        ),
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps encoded videos for later questions and `etchat infer`.")
    ] = None,
    cache_gib: Annotated[float, typer.Option(help="Size at which that folder takes no more.")] = 50.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object per answer, each on one line.")] = False,
) -> None:
    """Ask questions about one video; times in the answers are seconds since its first frame."""
    questions = questions or []
    _check_ask(questions, src, max_frames, window, overlap, interactive)
    from etchat_hf.clip_encoder import ClipEncoder
    from etchat_hf.inference import Chat, ask_each, ask_windows, check_windows, frame_budget, load, share_times
    from etchat_hf.toy import bundled_checkpoint

    share_times(questions, src)
    if window is not None:
        check_windows(window, overlap)
    if model is None:
        typer.echo("No --model: the bundled toy answers, which knows coloured shapes and nothing else.", err=True)
    network, processor = load(model or bundled_checkpoint(), dtype=dtype, device=device)
    encoder = ClipEncoder(network, processor, cache, cache_gib)
    if max_frames is None:  # windows are prompts of their own: together they may have more frames than fit one
        max_frames = frame_budget(network, processor) if window is None else sys.maxsize
    clip = encoder.encode(video, fps=fps, max_frames=max_frames)
    if window is not None:
        for question in questions:
            answer = ask_windows(network, processor, clip, question, window, overlap, fps, max_new_tokens)
            _print_answer(question, answer, as_json)
        return
    if not interactive:
        answers = ask_each(network, processor, clip, questions, src, fps, max_new_tokens=max_new_tokens)
        for question, answer in zip(questions, answers, strict=True):
            _print_answer(question, answer, as_json)
        return
    _converse(Chat(network, processor, clip, fps=fps), questions, src, max_new_tokens, as_json)


def _converse(chat, questions: list[str], src: list[float] | None, max_new_tokens: int, as_json: bool) -> None:
    from etchat_hf.inference import share_times

    for question, mine in zip(questions, share_times(questions, src), strict=True):
        _print_answer(question, chat.ask(question, mine, max_new_tokens), as_json)
    for line in filter(None, map(str.strip, sys.stdin)):
        try:
            _print_answer(line, chat.ask(line, max_new_tokens=max_new_tokens), as_json)
        except ValueError as error:  # the conversation is as it was: the next question can be asked
            typer.echo(f"etchat: error: {error}", err=True)


def _check_ask(questions, src, max_frames, window, overlap, interactive: bool) -> None:
    if not questions and not interactive:
        raise ValueError("give a QUESTION, or --interactive.")
    if not all(map(str.strip, questions)):
        raise ValueError("a QUESTION is empty; leave it out or write what to ask.")
    if window is None and overlap:
        raise ValueError(f"--overlap {overlap:g} is what windows share; give --window too.")
    if window is not None and (interactive or src or max_frames):
        raise ValueError(
            "--window asks questions without times, at one rate: leave --interactive, --src, --max-frames."
        )


def _print_answer(question: str, answer: dict, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"question": question, **answer}, ensure_ascii=False))
        return
    typer.echo(answer["answer"])
    for seconds, confidence in zip(answer["timestamps"], answer["confidences"], strict=True):
        typer.echo(f"  {seconds:8.2f} s  (confidence {confidence:.2f})", err=True)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a converted checkpoint.")],
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}; auto: as stored.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:0; default: a GPU where there is one.")
    ] = None,
) -> None:
    """Check a converted checkpoint: a strict load, prompt ids, and a fixed question on a generated clip."""
    from etchat_hf.verification import verify as run_checks

    for line in run_checks(model, dtype=dtype, device=device):
        typer.echo(line)


app.command()(convert)
app.command()(compress)
app.command()(pack)
app.add_typer(data_app, name="data")
app.add_typer(infer_app, name="infer")
app.add_typer(evaluate_app, name="evaluate")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. What a user can cause ends in one line on stderr and exit code 2."""
    try:
        app(args=args)
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"etchat: error: {_one_line(error)}", err=True)
        sys.exit(2)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()
