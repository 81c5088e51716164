"""Encode texts, fill masks, score texts; `python tools/encode.py --help` shows how."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from itertools import tee
from pathlib import Path
from typing import Any, Callable, Iterable

from tqdm import tqdm

from gluon_bert.cli import (
    OnOff,
    add_checkpoint_flag,
    add_device_flag,
    device,
    main_with_exit_status,
    parser_of,
    run,
)
from gluon_bert.errors import InputError
from gluon_bert.fileio import atomic_write, json_text
from gluon_bert.model.pooling import POOLINGS, Pooling

# Default of --top, and the labels to show of a fine-tuned network.
TOP = 5

EXAMPLES = """\
examples:
  python tools/encode.py runs/d2l-1 "a crane is flying" "a crane driver came || he just left"
  python tools/encode.py runs/d2l-1 --fill-mask "the <mask> is flying over the city" --top 10
  python tools/encode.py runs/d2l-1 --next "it was raining" "she took an umbrella"
  python tools/encode.py runs/d2l-1 --score "a crane is flying" "a crane are flying"
  python tools/encode.py runs/d2l-1 --input sentences.txt --output vectors.npz
  python tools/encode.py runs/d2l-1 --input sentences.txt --fill-mask --json > filled.jsonl
  python tools/encode.py runs/reader "Who left? || She left Paris for New York." --checkpoint best
  python tools/encode.py runs/minilm --input sentences.txt --similar 3
  python tools/encode.py runs/d2l-1 "a crane is flying" --attention attention.png
  python tools/encode.py runs/d2l-1 --nearest crane --top 10
  python tools/encode.py runs/minilm --similarity "a crane flies" "a bird is in the air"

RUN is the folder of a run or of an export. A fine-tuned run gives a label, a score, entities with their
places in characters, or the answer to "a question || its context", unless --token-vectors, --pooling or an
.npz requests vectors. Texts are split into words as in training; known tokens stay whole. The command reports
unknown words and truncated texts. A file of texts must not have empty lines.

An embedding is one vector for a text. Converted models of sentence-transformers say how it is made. --pooling
and --normalize set it for every run. --similar and --similarity compare embeddings by their cosine, unless
the model says dot product. Without a pooling they use the mean of all tokens.

vectors.npz holds, for N texts, the arrays cls, mean and pooled, (N, C), and truncated, (N,), how many tokens
were cut off; with a pooling also embeddings, (N, C); with --token-vectors also vectors, those of all tokens
one text after the other, and starts, (N + 1,), where each text begins. mean is over all tokens of a text,
<cls> and <sep> among them. A file of that name is replaced once the new one is whole.
"""


def parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    p = parser_of(
        "encode",
        "RUN [TEXT ...] [flags]",
        "Compute vectors of texts, fill masks, score texts, or compare texts.",
        EXAMPLES,
    )
    p.add_argument("run", type=Path, metavar="RUN", help="the folder of a run or of an export")
    p.add_argument("texts", nargs="*", metavar="TEXT", help='a text, or a pair: "a text || another"')
    ask = p.add_argument_group("what to compute (vectors)").add_mutually_exclusive_group()
    ask.add_argument(
        "--fill-mask", nargs="*", metavar="TEXT", help="print the likeliest words for each <mask>"
    )
    ask.add_argument(
        "--next",
        nargs="*",
        metavar="TEXT",
        help="print the probability that the second text follows the first",
    )
    ask.add_argument(
        "--similar", type=int, metavar="N", help="print the N most similar other texts for each text"
    )
    ask.add_argument(
        "--similarity", nargs="*", metavar="TEXT", help="print the similarity of the two texts of a pair"
    )
    p.add_argument(
        "--pooling", choices=POOLINGS, help="pool token vectors into one vector per text (as the model does)"
    )
    p.add_argument(
        "--normalize",
        action=OnOff,
        help="divide that vector by its length (as the model does)",
    )
    ask.add_argument(
        "--score",
        nargs="*",
        metavar="TEXT",
        help="print pseudo-log-likelihood, perplexity per token and least likely tokens",
    )
    ask.add_argument(
        "--attention",
        type=Path,
        metavar="FILE",
        help="draw the attention weights of one text (.png, .pdf, .svg)",
    )
    ask.add_argument("--nearest", metavar="WORD", help="the words whose embeddings are nearest")
    p.add_argument(
        "--top",
        type=int,
        metavar="N",
        help="number of words for each <mask> or --nearest, or of least likely tokens of --score (5)",
    )
    p.add_argument("--token-vectors", action="store_true", help="also compute the vector of each token")
    p.add_argument("--input", type=Path, metavar="FILE", help="read texts from a UTF-8 file, one per line")
    p.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write vectors to an .npz, or any result to a .jsonl",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object per line")
    p.add_argument(
        "--too-long",
        choices=("truncate", "error"),
        default="truncate",
        help="what to do with texts longer than max_seq_length (truncate)",
    )
    p.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of a run's matrix products; bf16 is faster where the processor has AVX512_BF16 (fp32)",
    )
    add_checkpoint_flag(p)
    add_device_flag(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    # Intermixed, because texts may come before and after the flags.
    return main_with_exit_status(parser(), argv, encode, intermixed=True)


def encode(arguments: argparse.Namespace) -> int:
    """Compute what the flags request."""
    from gluon_bert.export.exporter import load_predictor
    from gluon_bert.inference.text_files import count_lines, parse_line, read_lines

    ask, texts = asked(arguments)
    check(arguments, ask, texts)
    if ask in ("attention", "nearest"):
        return look_inside(arguments, ask, texts)
    if arguments.input:
        total, lines = count_lines(arguments.input), read_lines(arguments.input)
    else:
        parsed = [parse_line(f"text {number}", text) for number, text in enumerate(texts, 1)]
        total, lines = len(parsed), iter(parsed)
    predictor = load_predictor(arguments.run, device(arguments), arguments.checkpoint, arguments.precision)
    predictor.pooling = pooling_of(arguments, predictor.pooling)
    if predictor.task and ask == "vectors" and not wants_vectors(arguments):
        ask = "task"
    with ExitStack() as stack:
        if ask in ("similar", "similarity"):
            compare(arguments, ask, predictor, list(lines), stack)
        elif ask == "task" and predictor.task and predictor.task.scores_tokens:
            predict_tokens(arguments, predictor, lines, stack)
        else:
            predict(arguments, ask, predictor, lines, total, stack)
    if arguments.output:
        print(f"{arguments.output}: {total} texts")
    return 0


def predict(
    arguments: argparse.Namespace,
    ask: str,
    predictor: Any,
    lines: Iterable[Any],
    total: int,
    stack: ExitStack,
) -> None:
    """Print or write the vectors, masks, scores or labels of texts."""
    from gluon_bert.inference.encoded_lines import InputReport, encode_lines
    from gluon_bert.inference.scoring import score

    shown_lines, encoded_lines = tee(lines)
    texts = encode_lines(predictor.reader, encoded_lines, ask, arguments.too_long == "truncate")
    answers = score(predictor, texts) if ask == "score" else predictor.predict(texts)
    report = InputReport(predictor.reader.vocab.unk)
    bar = tqdm(total=total, unit=" texts", disable=not (arguments.input and sys.stderr.isatty()))
    show = sink(arguments, ask, predictor.reader.vocab, stack)
    for line, answer in zip(shown_lines, answers):
        show(line, answer)
        report.add(line, answer.text)
        bar.update(1)
    bar.close()
    print("".join(report.lines(predictor.reader.max_seq_length)), end="", file=sys.stderr)


def predict_tokens(
    arguments: argparse.Namespace, predictor: Any, lines: Iterable[Any], stack: ExitStack
) -> None:
    """Print or write the tags and entities of each text, or the answer to each question."""
    from gluon_bert.inference.encoded_lines import task_inputs
    from gluon_bert.inference.task_inputs import predict_tasks
    from gluon_bert.inference.text_output import format_token_results, with_texts

    shown_lines, encoded_lines = tee(lines)
    inputs = task_inputs(predictor.reader, predictor.task, encoded_lines)
    write = printer(arguments, stack)
    for line, result in zip(shown_lines, predict_tasks(predictor, inputs)):
        content = result.to_json()
        if arguments.json or arguments.output:
            write(json_text({**dict(zip(("text", "pair"), line.given)), **content}))
        else:
            write(with_texts(line.given, format_token_results(content, line.given)))


def compare(
    arguments: argparse.Namespace, ask: str, predictor: Any, lines: list[Any], stack: ExitStack
) -> None:
    """Print or write the similarity of each pair, or the most similar other texts of each text."""
    from gluon_bert.inference.encoded_lines import InputReport, encode_line
    from gluon_bert.inference.similarity import similar_pairs, similar_texts
    from gluon_bert.inference.text_output import format_similar

    if ask == "similar" and len(lines) < 2:
        raise InputError(f"--similar must have at least two texts, got {len(lines)}.")
    apart = ask == "similarity"  # then each text of a pair has an embedding
    for line in lines:
        if apart and line.second is None:
            raise InputError(f'{line.where}: must be a pair, "a text || another", for --similarity')
    given = [(line, texts) for line in lines for texts in (zip(line.given) if apart else [line.given])]
    truncate = arguments.too_long == "truncate"
    encoded = (encode_line(predictor.reader, line, texts, truncate) for line, texts in given)
    report = InputReport(predictor.reader.vocab.unk)
    embeddings = []
    for (line, _), answer in zip(given, predictor.predict(encoded)):
        embeddings.append(answer.embedding)
        report.add(line, answer.text)
    if ask == "similar":
        found = similar_texts(lines, embeddings, predictor.pooling, arguments.similar)
    else:
        found = similar_pairs(lines, embeddings, predictor.pooling)
    write = printer(arguments, stack)
    for content in found:
        write(json_text(content) if arguments.json or arguments.output else format_similar(content))
    print("".join(report.lines(predictor.reader.max_seq_length)), end="", file=sys.stderr)


def look_inside(arguments: argparse.Namespace, ask: str, texts: list[str]) -> int:
    """Draw the attention weights of a text, or print the words nearest to a word."""
    from gluon_bert.export.manifest import MANIFEST
    from gluon_bert.inference.attention import check_picture
    from gluon_bert.inference.text_files import parse_line
    from gluon_bert.inference.text_output import printable
    from gluon_bert.run import load_run

    if (arguments.run / MANIFEST).exists():
        raise InputError(f"--{ask} needs the folder of a run, got {arguments.run}, which is an export.")
    if ask == "attention":
        check_picture(arguments.attention, "--attention")
    run = load_run(arguments.run, [device(arguments)], arguments.checkpoint)
    if ask == "nearest":
        found = run.nearest(arguments.nearest, arguments.top or TOP)
        if arguments.json:
            print(json_text({"word": arguments.nearest, "nearest": [list(each) for each in found]}))
        else:
            print("\n".join(f"{cosine:8.4f}  {printable(word)}" for word, cosine in found))
        return 0
    given = parse_line("text 1", texts[0]).given
    attention = run.attention(given if len(given) == 2 else given[0])
    attention.save(arguments.attention)
    layers, heads, tokens, _ = attention.weights.shape
    print(f"{arguments.attention}: {layers} layers, {heads} heads, {tokens} tokens")
    return 0


def pooling_of(arguments: argparse.Namespace, own: Pooling | None) -> Pooling | None:
    """Return the pooling of the flags or of the model, or None."""
    if arguments.pooling is None and arguments.normalize is None and own is None:
        return Pooling() if arguments.similar is not None or arguments.similarity is not None else None
    own = own or Pooling()
    normalize = own.normalize if arguments.normalize is None else arguments.normalize
    return Pooling(arguments.pooling or own.mode, normalize, own.similarity)


def asked(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """Return what to compute, and the texts of the command line."""
    if arguments.fill_mask is not None:
        return "masks", arguments.texts + arguments.fill_mask
    if arguments.score is not None:
        return "score", arguments.texts + arguments.score
    if arguments.similar is not None:
        return "similar", arguments.texts
    if arguments.attention is not None or arguments.nearest is not None:
        return "nearest" if arguments.attention is None else "attention", arguments.texts
    pairs = arguments.next if arguments.similarity is None else arguments.similarity
    if pairs is None:
        return "vectors", arguments.texts
    texts = arguments.texts + pairs
    if len(texts) == 2 and not any("||" in text for text in texts):
        texts = [" || ".join(texts)]
    return "next" if arguments.similarity is None else "similarity", texts


def wants_vectors(arguments: argparse.Namespace) -> bool:
    """Return whether the flags request vectors, also of a fine-tuned network."""
    npz = arguments.output is not None and arguments.output.suffix == ".npz"
    pooling = arguments.pooling is not None or arguments.normalize is not None
    return npz or arguments.token_vectors or pooling


def check(arguments: argparse.Namespace, ask: str, texts: list[str]) -> None:
    """Raise one InputError with a line for each problem of the flags."""
    problems = []
    if arguments.input and texts:
        problems.append("--input must be omitted with texts on the command line.")
    if ask == "nearest" and texts:
        problems.append("texts must be omitted with --nearest, which takes one word.")
    if ask == "attention" and len(texts) > 1:
        problems.append(f"--attention must have one text or pair, got {len(texts)}.")
    if ask in ("attention", "nearest") and (arguments.input or arguments.output or arguments.token_vectors):
        problems.append(f"--{ask} cannot be used with --input, --output or --token-vectors.")
    if not arguments.input and not texts and ask != "nearest":
        problems.append('texts must be given, such as "a crane is flying", or a file of them with --input.')
    if arguments.top is not None and arguments.top < 1:
        problems.append(f"--top must be at least 1, got {arguments.top}.")
    if arguments.top is not None and ask not in ("masks", "score", "nearest"):
        problems.append("--top has no effect without --fill-mask, --nearest or --score.")
    pools = ask in ("vectors", "similar", "similarity")
    if (arguments.pooling or arguments.normalize is not None) and not pools:
        problems.append("--pooling and --normalize have an effect on vectors and similarities only.")
    if arguments.similar is not None and arguments.similar < 1:
        problems.append(f"--similar must be at least 1, got {arguments.similar}.")
    output = arguments.output
    if output and (output.is_dir() or (arguments.input and same_file(output, arguments.input))):
        what = "is a folder" if output.is_dir() else "is the file of --input"
        problems.append(f"--output must be a new file, got {output}, which {what}.")
    if output and output.suffix not in (".npz", ".jsonl"):
        problems.append(f"--output must end in .npz, for vectors, or in .jsonl, got {output}.")
    if output and output.suffix == ".npz" and ask != "vectors":
        problems.append(f"--output must be a .jsonl file for results other than vectors, got {output}.")
    if output and not output.absolute().parent.is_dir():
        problems.append(f"--output must be in an existing folder, got {output}.")
    if output and arguments.json:
        problems.append("--json must be omitted with --output.")
    if problems:
        raise InputError("\n".join(problems))


def same_file(one: Path, other: Path) -> bool:
    """Return whether both are the same existing file."""
    return one.exists() and other.exists() and one.samefile(other)


def printer(arguments: argparse.Namespace, stack: ExitStack) -> Callable[[str], None]:
    """Return a function that prints a text, or writes it to the file of --output."""
    file = stack.enter_context(atomic_write(arguments.output)) if arguments.output else sys.stdout
    return lambda text: print(text, file=file)


def sink(arguments: argparse.Namespace, ask: str, vocab: Any, stack: ExitStack) -> Callable[[Any, Any], None]:
    """Return a function that prints or writes each line's answer."""
    from gluon_bert.inference.json_output import as_json
    from gluon_bert.inference.text_files import vector_file

    top = arguments.top or TOP
    if arguments.output and arguments.output.suffix == ".npz":
        vectors = stack.enter_context(vector_file(arguments.output, arguments.token_vectors))
        return lambda line, answer: vectors.add(answer)

    def as_line(line: Any, answer: Any) -> str:
        if not (arguments.json or arguments.output):
            return as_text(line, answer, ask, vocab, arguments)
        if ask == "score":
            return json_text(answer.to_json(top, line.given))
        return json_text(as_json(answer, vocab, [ask], top, arguments.token_vectors, line.given))

    write = printer(arguments, stack)
    return lambda line, answer: write(as_line(line, answer))


def as_text(line: Any, answer: Any, ask: str, vocab: Any, arguments: argparse.Namespace) -> str:
    """Return an answer as lines of text for the terminal."""
    from gluon_bert.inference import text_output

    top = arguments.top or TOP
    formats: dict[str, Callable[[], list[str]]] = {
        "vectors": lambda: text_output.format_vectors(answer, arguments.token_vectors),
        "masks": lambda: text_output.format_masks(answer, vocab, top),
        "next": lambda: text_output.format_next_sentence(answer),
        "score": lambda: text_output.format_score(answer, top),
        "task": lambda: text_output.format_task_prediction(answer.task_prediction, TOP),
    }
    return text_output.with_texts(line.given, formats[ask]())


if __name__ == "__main__":
    run(main)
