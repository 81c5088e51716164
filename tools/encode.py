"""Asks a pretrained network about texts: `python tools/encode.py --help` tells how."""

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

from gluon_bert.cli import add_checkpoint_flag, add_device_flag, device, main_with_exit_status, parser_of, run
from gluon_bert.errors import InputError
from gluon_bert.fileio import atomic_write, json_text
from gluon_bert.model.pooling import POOLINGS, Pooling

# Words that are told for a <mask> where nobody says how many.
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

RUN is the folder of a run, or that of an export. A fine-tuned one tells what it was fine-tuned for: a label,
a score, entities with their places in characters, or the answer to "a question || its context", unless
--token-vectors or an .npz asks for vectors. A text is split into words as in training; one whose tokens stand
apart by spaces is taken as it is. Words that the vocabulary does not have are told, and so is what was cut
off where a text is longer than the network was trained for. In a file of texts no line may be empty.

An embedding is one vector for a text. Converted models of sentence-transformers say how it is made. --pooling
and --normalize set it for every run. --similar and --similarity compare embeddings by their cosine, unless the
model says dot product. Without a pooling they use the mean of all tokens.

vectors.npz holds, for N texts, the arrays cls, mean and pooled, (N, C), and truncated, (N,), how many tokens
were cut off; with a pooling also embeddings, (N, C); with --token-vectors also vectors, those of all tokens one
text after the other, and starts, (N + 1,), where each text begins. mean is over all tokens of a text, <cls> and <sep> among them. A file of
that name is replaced once the new one is whole.
"""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser_of(
        "encode",
        "RUN [TEXT ...] [flags]",
        "Vectors of texts, words for their masks, or whether one text follows another.",
        EXAMPLES,
    )
    p.add_argument("run", type=Path, metavar="RUN", help="the folder of a run or of an export")
    p.add_argument("texts", nargs="*", metavar="TEXT", help='a text, or a pair: "a text || another"')
    ask = p.add_argument_group("what to ask (vectors)").add_mutually_exclusive_group()
    ask.add_argument("--fill-mask", nargs="*", metavar="TEXT", help="the likeliest words for each <mask>")
    ask.add_argument("--next", nargs="*", metavar="TEXT", help="how likely the second text follows the first")
    ask.add_argument("--similar", type=int, metavar="N", help="the N most similar other texts for each text")
    ask.add_argument(
        "--similarity", nargs="*", metavar="TEXT", help="how similar the two texts of a pair are"
    )
    p.add_argument(
        "--pooling", choices=POOLINGS, help="make one vector of a text's token vectors (as the model says)"
    )
    p.add_argument(
        "--normalize",
        action="store_true",
        default=None,
        help="divide that vector by its length (as the model says); --no-normalize does not",
    )
    p.add_argument("--no-normalize", dest="normalize", action="store_false", help=argparse.SUPPRESS)
    ask.add_argument(
        "--score",
        nargs="*",
        metavar="TEXT",
        help="pseudo-log-likelihood, perplexity per token and least likely tokens",
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
        help="words for each <mask> or --nearest, or least likely tokens of --score (5)",
    )
    p.add_argument("--token-vectors", action="store_true", help="also the vector of each token")
    p.add_argument("--input", type=Path, metavar="FILE", help="texts from a UTF-8 file, a line each")
    p.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="vectors to an .npz, or anything to a .jsonl; may be large",
    )
    p.add_argument("--json", action="store_true", help="an object a line, on the screen")
    p.add_argument(
        "--too-long",
        choices=("cut", "refuse"),
        default="cut",
        help="what to do with texts above max_seq_length (cut)",
    )
    add_checkpoint_flag(p)
    add_device_flag(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    # Intermixed, since texts may stand before and behind the flags.
    return main_with_exit_status(parser(), argv, encode, intermixed=True)


def encode(arguments: argparse.Namespace) -> int:
    """Answer as the flags say."""
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
    predictor = predictor_of(arguments.run, device(arguments), arguments.checkpoint)
    predictor.pooling = pooling_of(arguments, predictor.pooling)
    if ask in ("similar", "similarity"):
        return compare(arguments, ask, predictor, list(lines))
    if predictor.task and ask == "vectors" and not wants_vectors(arguments):
        ask = "task"
    told, asked_lines = tee(lines)
    truncate = arguments.too_long == "cut"
    if ask == "task" and predictor.task.scores_tokens:
        return show_results(arguments, predictor, told, asked_lines, total)
    texts_read = readable(predictor.reader, asked_lines, ask, truncate)
    answers = score(predictor, texts_read) if ask == "score" else predictor.predict(texts_read)
    seen = Seen(predictor.reader.vocab.unk)
    bar = tqdm(total=total, unit=" texts", disable=not (arguments.input and sys.stderr.isatty()))
    with ExitStack() as stack:
        show = sink(arguments, ask, predictor.reader.vocab, stack)
        for line, answer in zip(told, answers):
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
    """Return a line as the task reads it; InputError says where it was found."""
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
    truncate = arguments.too_long == "cut"
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
    """Yield the similarity of each pair's texts, which stand one after the other."""
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
    """What is asked, and the texts of the command line."""
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
    """Whether the flags ask for vectors, rather than for what a network was made for."""
    npz = arguments.output is not None and arguments.output.suffix == ".npz"
    pooling = arguments.pooling is not None or arguments.normalize is not None
    return npz or arguments.token_vectors or pooling


def check(arguments: argparse.Namespace, ask: str, texts: list[str]) -> None:
    """Raise one InputError that tells everything that is wrong with the flags."""
    problems = []
    if arguments.input and texts:
        problems.append("--input: texts on the command line too; give one or the other")
    if ask == "nearest" and texts:
        problems.append(f"--nearest {arguments.nearest}: asks about one word; give no texts")
    if ask == "attention" and len(texts) > 1:
        problems.append(
            f"--attention {arguments.attention}: draws one text or pair; give one, not {len(texts)}"
        )
    if ask in ("attention", "nearest") and (arguments.input or arguments.output or arguments.token_vectors):
        problems.append(f"--{ask}: cannot be used with --input, --output or --token-vectors")
    if not arguments.input and not texts and ask != "nearest":
        problems.append('no text: give some, such as "a crane is flying", or a file of them with --input')
    if arguments.top is not None and arguments.top < 1:
        problems.append(f"--top {arguments.top}: must be at least 1")
    if arguments.top is not None and ask not in ("masks", "score", "nearest"):
        problems.append(f"--top {arguments.top}: is for --fill-mask, --nearest and --score")
    if (arguments.pooling or arguments.normalize is not None) and ask in (
        "masks",
        "next",
        "score",
        "attention",
        "nearest",
    ):
        problems.append("--pooling and --normalize: are for vectors and similarities")
    if arguments.similar is not None and arguments.similar < 1:
        problems.append(f"--similar {arguments.similar}: must be at least 1")
    output = arguments.output
    if output and (output.is_dir() or (arguments.input and same_file(output, arguments.input))):
        what = "is a folder" if output.is_dir() else "is the file of --input"
        problems.append(f"--output {output}: {what}; name another file")
    if output and output.suffix not in (".npz", ".jsonl"):
        problems.append(f"--output {output}: must end in .npz, for vectors, or in .jsonl")
    if output and output.suffix == ".npz" and ask != "vectors":
        problems.append(f"--output {output}: an .npz holds vectors only; name a .jsonl file")
    if output and not output.absolute().parent.is_dir():
        problems.append(f"--output {output}: there is no folder {output.parent}")
    if output and arguments.json:
        problems.append("--json: is for the screen, --output writes a file; give one of them")
    if problems:
        raise InputError("\n".join(problems))


def same_file(one: Path, other: Path) -> bool:
    """Whether both are one file that is there."""
    return one.exists() and other.exists() and one.samefile(other)


def predictor_of(folder: Path, context: Any, checkpoint: str = "latest") -> Any:
    """What answers for a run's folder, or for that of an export."""
    from gluon_bert.export.exporter import load_exported
    from gluon_bert.export.manifest import MANIFEST
    from gluon_bert.inference.predictor import Predictor
    from gluon_bert.run import load_run

    if (folder / MANIFEST).exists():
        if checkpoint != "latest":
            raise InputError(
                f"--checkpoint {checkpoint}: {folder} is an export, of one network; name its run"
            )
        return load_exported(folder, context).predictor
    return Predictor.of(load_run(folder, [context], checkpoint))


def readable(reader: Any, lines: Iterable[Any], ask: str, truncate: bool) -> Iterator[Any]:
    """The texts as the network reads them; InputError says which cannot be asked that."""
    for line in lines:
        text = encoded(reader, line, line.given, truncate)
        if ask == "masks" and not len(text.masks):
            cut = f" in its first {reader.max_seq_length} tokens" if text.truncated else ""
            raise InputError(f"{line.where}: there is no <mask>{cut}; put one where a word is to be found")
        if ask == "score" and len(text.masks):
            raise InputError(f"{line.where}: a text to score must not contain <mask>. Replace it by a word.")
        if ask == "next" and not text.is_pair:
            raise InputError(f'{line.where}: is a single text; a pair is "a text || another"')
        yield text


def encoded(reader: Any, line: Any, texts: tuple[str, ...], truncate: bool) -> Any:
    """Return a text or a pair as the network reads it; InputError says where it was found."""
    try:
        return reader.text(*texts, truncate=truncate)
    except InputError as problem:
        raise InputError(f"{line.where}: {problem}") from problem


def sink(arguments: argparse.Namespace, ask: str, vocab: Any, stack: ExitStack) -> Callable[[Any, Any], None]:
    """What is done with each line and its answer."""
    from gluon_bert.inference.json_output import as_json
    from gluon_bert.inference.text_files import vector_file

    def as_line(line: Any, answer: Any) -> str:
        if ask == "score":
            return json_text(answer.to_json(arguments.top or TOP, line.given))
        content = as_json(answer, vocab, [ask], arguments.top or TOP, arguments.token_vectors, line.given)
        return json_text(content)

    if arguments.output is None:
        show = (
            as_line if arguments.json else lambda line, answer: in_words(line, answer, ask, vocab, arguments)
        )
        return lambda line, answer: print(show(line, answer))
    if arguments.output.suffix == ".npz":
        vectors = stack.enter_context(vector_file(arguments.output, arguments.token_vectors))
        return lambda line, answer: vectors.add(answer)
    file = stack.enter_context(atomic_write(arguments.output))
    return lambda line, answer: print(as_line(line, answer), file=file)


def in_words(line: Any, answer: Any, ask: str, vocab: Any, arguments: argparse.Namespace) -> str:
    """An answer for people."""
    told = [" || ".join(line.given)]
    if ask == "masks":
        filled = answer.fill_masks(vocab, arguments.top or TOP)
        for number, words in enumerate(filled, 1):
            told += [f"  <mask> {number} of {len(filled)}"] if len(filled) > 1 else []
            told += [f"  {probability:8.4f}  {word}" for word, probability in words]
    elif ask == "score":
        told.append(f"  {answer.log_likelihood:8.2f}  log-likelihood, perplexity {answer.perplexity:.1f}")
        told += [
            f"  {value:8.2f}  {token} (token {position})"
            for position, token, value in answer.least_likely(arguments.top or TOP)
        ]
    elif ask == "task":
        told += verdict_in_words(answer.task_prediction)
    elif ask == "next":
        told.append(
            f"  {answer.next_sentence_probability:.4f}  is the probability that the second follows the first"
        )
    else:
        named = {"cls": answer.cls, "mean": answer.mean}
        if answer.pooled is not None:
            named["pooled"] = answer.pooled
        if answer.embedding is not None:
            named = {"embedding": answer.embedding, **named}
        told.append(f"  tokens    {' '.join(answer.text.tokens)}")
        told += [f"  {name:<9} {numbers_in_words(vector)}" for name, vector in named.items()]
        if arguments.token_vectors:
            told += [
                f"  {token:<15} {numbers_in_words(vector)}"
                for token, vector in zip(answer.text.tokens, answer.vectors)
            ]
    return "\n".join(map(printable, told))


def verdict_in_words(verdict: dict[str, Any]) -> list[str]:
    """What a fine-tuned network says, the likeliest label first."""
    if "score" in verdict:
        return [f"  {verdict['score']:8.4f}  is the score"]
    likeliest = sorted(verdict["probabilities"].items(), key=lambda each: -each[1])[:TOP]
    return [f"  {probability:8.4f}  {label}" for label, probability in likeliest]


def printable(text: str) -> str:
    """A text in which nothing speaks to the terminal but to the reader."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def numbers_in_words(vector: np.ndarray, shown: int = 5) -> str:
    """The first few of a vector's numbers, and how many there are."""
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
            yield f"longer than {max_seq_length} tokens and cut ({self._num_cut} of {self._texts} texts): {where}\n"


if __name__ == "__main__":
    run(main)
