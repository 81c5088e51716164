"""Encode texts, fill masks, score texts; `python tools/encode.py --help` shows how."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from contextlib import ExitStack
from itertools import tee
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

import numpy as np
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

# Default of --top.
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
    """Run the command; returns its exit status."""
    # Intermixed, because texts may come before and after the flags.
    return main_with_exit_status(parser(), argv, encode, intermixed=True)


def encode(arguments: argparse.Namespace) -> int:
    """Compute what the flags request."""
    from gluon_bert.inference.scoring import score
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
    predictor = predictor_of(arguments.run, device(arguments), arguments.checkpoint, arguments.precision)
    predictor.pooling = pooling_of(arguments, predictor.pooling)
    if ask in ("similar", "similarity"):
        return compare(arguments, ask, predictor, list(lines))
    if predictor.task and ask == "vectors" and not wants_vectors(arguments):
        ask = "task"
    shown_lines, encoded_lines = tee(lines)
    truncate = arguments.too_long == "truncate"
    if ask == "task" and predictor.task.scores_tokens:
        return show_results(arguments, predictor, shown_lines, encoded_lines, total)
    texts_read = readable(predictor.reader, encoded_lines, ask, truncate)
    answers = score(predictor, texts_read) if ask == "score" else predictor.predict(texts_read)
    seen = Seen(predictor.reader.vocab.unk)
    bar = tqdm(total=total, unit=" texts", disable=not (arguments.input and sys.stderr.isatty()))
    with ExitStack() as stack:
        show = sink(arguments, ask, predictor.reader.vocab, stack)
        for line, answer in zip(shown_lines, answers):
            show(line, answer)
            seen.add(line, answer)
            bar.update(1)
        bar.close()
    print("".join(seen.report(predictor.reader.max_seq_length)), end="", file=sys.stderr)
    if arguments.output:
        print(f"{arguments.output}: {total} texts")
    return 0


def show_results(
    arguments: argparse.Namespace, predictor: Any, lines: Iterable[Any], asked: Iterable[Any], total: int
) -> int:
    """Show the tags and entities of each text, or the answer of each question."""
    from gluon_bert.inference.task_inputs import predict_tasks

    inputs = (task_input_of(predictor, line) for line in asked)
    with ExitStack() as stack:
        file = stack.enter_context(atomic_write(arguments.output)) if arguments.output else sys.stdout
        as_json = arguments.json or arguments.output
        for line, result in zip(lines, predict_tasks(predictor, inputs)):
            content = result.to_json()
            given = dict(zip(("text", "pair"), line.given))
            shown = json_text({**given, **content}) if as_json else result_lines(line, content)
            print(shown, file=file)
    if arguments.output:
        print(f"{arguments.output}: {total} texts")
    return 0


def task_input_of(predictor: Any, line: Any) -> Any:
    """Return a line as the task reads it. Raise InputError, which says where it was found."""
    from gluon_bert.inference.task_inputs import task_input

    try:
        return task_input(predictor.task, predictor.reader, *line.given)
    except InputError as problem:
        raise InputError(f"{line.where}: {problem}") from problem


def result_lines(line: Any, content: dict[str, Any]) -> str:
    """Return a task's result, as text for the terminal."""
    shown = [" || ".join(line.given)]
    if "answer" in content:
        place = f"({content['start']} to {content['end']})" if content["answer"] else ""
        shown.append(f"  {content['score']:8.4f}  {content['answer'] or 'no answer'} {place}")
    if "tags" in content and "entities" not in content:
        text, names = line.given[0], ("probabilities", "tags", "starts", "ends")
        for probability, tag, start, end in zip(*(content[name] for name in names)):
            shown.append(f"  {probability:8.4f}  {tag}  {text[start:end]}")
    for entity in content.get("entities", []):
        place = f"({entity['start']} to {entity['end']})"
        shown.append(f"  {entity['probability']:8.4f}  {entity['type']}  {entity['text']} {place}")
    return "\n".join(map(printable, shown))


def look_inside(arguments: argparse.Namespace, ask: str, texts: list[str]) -> int:
    """Draw the attention weights of a text, or print the words nearest to a word."""
    from gluon_bert.export.manifest import MANIFEST
    from gluon_bert.inference.attention import check_picture
    from gluon_bert.inference.text_files import parse_line
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
    """Return the pooling of the flags, or else the model's own; None where neither says one."""
    if arguments.pooling is None and arguments.normalize is None and own is None:
        return Pooling() if arguments.similar is not None or arguments.similarity is not None else None
    own = own or Pooling()
    normalize = own.normalize if arguments.normalize is None else arguments.normalize
    return Pooling(arguments.pooling or own.mode, normalize, own.similarity)


def compare(arguments: argparse.Namespace, ask: str, predictor: Any, lines: list[Any]) -> int:
    """Print how similar texts are: those of each pair, or for each text the most similar others."""
    for line in lines:
        if ask == "similarity" and line.second is None:
            raise InputError(f'{line.where}: must be a pair, "a text || another", for --similarity')
    # The texts of a pair that is compared in itself are read one by one.
    apart = [(text,) for line in lines for text in line.given] if ask == "similarity" else None
    given = apart or [line.given for line in lines]
    places = [line for line in lines for _ in line.given] if apart else lines
    seen = Seen(predictor.reader.vocab.unk)
    truncate = arguments.too_long == "truncate"
    texts = (encoded(predictor.reader, line, each, truncate) for line, each in zip(places, given))
    embeddings = []
    for line, answer in zip(places, predictor.predict(texts)):
        embeddings.append(answer.embedding)
        seen.add(line, answer)
    found = (similar_texts if ask == "similar" else similar_pairs)(arguments, predictor, lines, embeddings)
    with ExitStack() as stack:
        file = stack.enter_context(atomic_write(arguments.output)) if arguments.output else sys.stdout
        for content in found:
            as_json = arguments.json or arguments.output
            print(json_text(content) if as_json else similar_lines(content), file=file)
    print("".join(seen.report(predictor.reader.max_seq_length)), end="", file=sys.stderr)
    if arguments.output:
        print(f"{arguments.output}: {len(lines)} texts")
    return 0


def similar_pairs(
    _: Any, predictor: Any, lines: list[Any], embeddings: list[Any]
) -> Iterator[dict[str, Any]]:
    """Yield the similarity of the texts of each pair, which follow each other."""
    for line, one, other in zip(lines, embeddings[::2], embeddings[1::2]):
        (similarity,) = predictor.pooling.similarities(one[None], other[None]).ravel().tolist()
        yield {"text": line.first, "pair": line.second, "similarity": similarity}


def similar_texts(
    arguments: argparse.Namespace, predictor: Any, lines: list[Any], embeddings: list[Any]
) -> Iterator[dict[str, Any]]:
    """Yield for each text the most similar others."""
    from gluon_bert.inference.similarity import nearest

    for line, found in zip(lines, nearest(np.stack(embeddings), arguments.similar, predictor.pooling)):
        similar = [
            {"number": int(i) + 1, "text": " || ".join(lines[i].given), "similarity": float(value)}
            for i, value in zip(found.indices, found.similarities)
        ]
        yield {"text": " || ".join(line.given), "similar": similar}


def similar_lines(content: dict[str, Any]) -> str:
    """Return what `compare` found, as text for the terminal."""
    if "similarity" in content:
        shown = [f"{content['text']} || {content['pair']}", f"  {content['similarity']:7.4f}"]
    else:
        shown = [content["text"]]
        shown += [f"  {each['similarity']:7.4f}  {each['text']}" for each in content["similar"]]
    return "\n".join(map(printable, shown))


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


def predictor_of(folder: Path, context: Any, checkpoint: str = "latest", precision: str = "fp32") -> Any:
    """Return the predictor of a run or of an export."""
    from gluon_bert.export.exporter import load_exported
    from gluon_bert.export.manifest import MANIFEST
    from gluon_bert.inference.predictor import Predictor
    from gluon_bert.run import load_run
    from gluon_bert.training.checks import check_precision

    if (folder / MANIFEST).exists():
        if precision != "fp32":
            raise InputError(
                f"--precision {precision} needs a run, got {folder}, an export. Give the folder of its run."
            )
        if checkpoint != "latest":
            raise InputError(
                f"--checkpoint must be omitted for an export such as {folder}, got {checkpoint}."
            )
        return load_exported(folder, context).predictor
    check_precision(precision, [context])
    run = load_run(folder, [context], checkpoint)
    run.net.set_matmul_precision(precision)
    return Predictor.of(run)


def readable(reader: Any, lines: Iterable[Any], ask: str, truncate: bool) -> Iterator[Any]:
    """Yield encoded texts. Raise InputError for a text without the mask or the pair that `ask` needs."""
    for line in lines:
        text = encoded(reader, line, line.given, truncate)
        if ask == "masks" and not len(text.masks):
            cut = f" in its first {reader.max_seq_length} tokens" if text.truncated else ""
            raise InputError(f"{line.where}: must have a <mask>{cut}. Put one in place of a word.")
        if ask == "score" and len(text.masks):
            raise InputError(f"{line.where}: a text to score must not contain <mask>. Replace it by a word.")
        if ask == "next" and not text.is_pair:
            raise InputError(f'{line.where}: must be a pair, such as "a text || another", got a single text.')
        yield text


def encoded(reader: Any, line: Any, texts: tuple[str, ...], truncate: bool) -> Any:
    """Encode a text or a pair. Raise InputError, which names its line."""
    try:
        return reader.text(*texts, truncate=truncate)
    except InputError as problem:
        raise InputError(f"{line.where}: {problem}") from problem


def sink(arguments: argparse.Namespace, ask: str, vocab: Any, stack: ExitStack) -> Callable[[Any, Any], None]:
    """Return a function that prints or writes each line's answer."""
    from gluon_bert.inference.json_output import as_json
    from gluon_bert.inference.text_files import vector_file

    def as_line(line: Any, answer: Any) -> str:
        if ask == "score":
            return json_text(answer.to_json(arguments.top or TOP, line.given))
        content = as_json(answer, vocab, [ask], arguments.top or TOP, arguments.token_vectors, line.given)
        return json_text(content)

    if arguments.output is None:
        show = (
            as_line
            if arguments.json
            else lambda line, answer: format_answer(line, answer, ask, vocab, arguments)
        )
        return lambda line, answer: print(show(line, answer))
    if arguments.output.suffix == ".npz":
        vectors = stack.enter_context(vector_file(arguments.output, arguments.token_vectors))
        return lambda line, answer: vectors.add(answer)
    file = stack.enter_context(atomic_write(arguments.output))
    return lambda line, answer: print(as_line(line, answer), file=file)


def format_answer(line: Any, answer: Any, ask: str, vocab: Any, arguments: argparse.Namespace) -> str:
    """Return an answer as lines of text."""
    lines = [" || ".join(line.given)]
    if ask == "masks":
        filled = answer.fill_masks(vocab, arguments.top or TOP)
        for number, words in enumerate(filled, 1):
            lines += [f"  <mask> {number} of {len(filled)}"] if len(filled) > 1 else []
            lines += [f"  {probability:8.4f}  {word}" for word, probability in words]
    elif ask == "score":
        lines.append(f"  {answer.log_likelihood:8.2f}  log-likelihood, perplexity {answer.perplexity:.1f}")
        lines += [
            f"  {value:8.2f}  {token} (token {position})"
            for position, token, value in answer.least_likely(arguments.top or TOP)
        ]
    elif ask == "task":
        lines += format_task_prediction(answer.task_prediction)
    elif ask == "next":
        lines.append(
            f"  {answer.next_sentence_probability:.4f}  is the probability that the second follows the first"
        )
    else:
        named = {"cls": answer.cls, "mean": answer.mean}
        if answer.pooled is not None:
            named["pooled"] = answer.pooled
        if answer.embedding is not None:
            named = {"embedding": answer.embedding, **named}
        lines.append(f"  tokens    {' '.join(answer.text.tokens)}")
        lines += [f"  {name:<9} {format_vector(vector)}" for name, vector in named.items()]
        if arguments.token_vectors:
            lines += [
                f"  {token:<15} {format_vector(vector)}"
                for token, vector in zip(answer.text.tokens, answer.vectors)
            ]
    return "\n".join(map(printable, lines))


def format_task_prediction(verdict: dict[str, Any]) -> list[str]:
    """Return the prediction of a fine-tuned network as lines, the likeliest label first."""
    if "score" in verdict:
        return [f"  {verdict['score']:8.4f}  is the score"]
    likeliest = sorted(verdict["probabilities"].items(), key=lambda each: -each[1])[:TOP]
    return [f"  {probability:8.4f}  {label}" for label, probability in likeliest]


def printable(text: str) -> str:
    """Return a text without control characters for the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def format_vector(vector: np.ndarray, shown: int = 5) -> str:
    """Return the first numbers of a vector, and its size."""
    return f"{' '.join(f'{number:8.4f}' for number in vector[:shown])} ... ({len(vector)} numbers)"


class Seen:
    """What the user should know of the texts that went by."""

    def __init__(self, unk: int) -> None:
        self._unk = unk
        self._texts = self._tokens = self._num_unknown = self._num_cut = 0
        self._unknown: Counter[str] = Counter()
        self._cut: list[str] = []

    def add(self, line: Any, answer: Any) -> None:
        """One more text."""
        text = answer.text
        self._texts += 1
        self._tokens += len(text)
        self._num_unknown += int((text.ids == self._unk).sum())
        # Enough to name the most frequent ones, however many texts come.
        if len(self._unknown) < 10_000:
            self._unknown.update(text.unknown)
        if text.truncated:
            self._num_cut += 1
            self._cut += [line.where] * (len(self._cut) < 3)

    def report(self, max_seq_length: int) -> Iterator[str]:
        """Lines on unknown words and on texts that were cut."""
        if self._num_unknown:
            words = " ".join(word for word, _ in self._unknown.most_common(10))
            more = " ..." if len(self._unknown) > 10 else ""
            share = f"{self._num_unknown} of {self._tokens} tokens"
            yield f"not in the vocabulary, read as <unk> ({share}): {words}{more}\n"
        if self._num_cut:
            where = "; ".join(self._cut) + (" ..." if self._num_cut > len(self._cut) else "")
            share = f"{self._num_cut} of {self._texts} texts"
            yield f"truncated to {max_seq_length} tokens ({share}): {where}\n"


if __name__ == "__main__":
    run(main)
