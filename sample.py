"""Sample from a trained model.

    python sample.py out/quickstart --prompt="The list object" --max_new_tokens=100 --num_samples=3
    python sample.py out/quickstart --prompts=FILE       a prompt a line, their samples one after another
    python sample.py out/quickstart --interactive        asks for prompts; Ctrl-C stops a sample
    python sample.py out/quickstart --score=FILE         loss, perplexity and bits per byte of a text, of records (JSONL, JSON, parquet)
                                                         or of the validation documents of a prepared corpus's folder

Writes the generated text, and nothing else, to standard output. On a terminal it comes as it is generated, after its prompt, and lines
stand between samples. Several samples are generated as one batch and written one after another."""

import codecs
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from common import NOT_NEGATIVE, Parser, UserError, choose_device, one_of, read_text, run, waiting  # isort: skip, for it tells of packages that are missing
from tqdm import tqdm

from data import sources
from data import tokenizer as tokenizers
from data.corpus import Corpus

# What needs torch, whose import takes seconds, is imported where it is used, so that a mistake in the command line is answered at once.

BATCH = 64  # samples generated at a time
CACHES = ("exact", "stream", "none")
RANGES = {  # of the arguments of generate_many(), and of --stride: (predicate of the value, what it must be)
    "max_new_tokens": NOT_NEGATIVE,
    "num_samples": (lambda value: 1 <= value <= 4096, "1 to 4096"),
    "temperature": (lambda value: 0 <= value < math.inf, "0 or more, and finite"),
    "top_k": (lambda value: value >= 0, "0 or more"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "seed": NOT_NEGATIVE,
    "stop": (lambda value: not isinstance(value, str) and all(value), "a list of texts that are not empty"),
    "cache": one_of(*CACHES),
    "stride": (lambda value: value is None or value >= 1, "1 or more"),
}
LINE = "\n" + "-" * 15 + "\n"  # between samples on a terminal


def load(out_dir, device="auto"):
    """(model, tokenizer) of an output folder of train.py, whose best checkpoint is taken, or of a checkpoint; the model in evaluation
    mode on its device, with the checkpoint's hash as model.sha256. Raises UserError if there is none, or it is damaged."""
    from decoding.generate import for_decoding
    from training import checkpoint

    device = choose_device(device)
    path = checkpoint.find(out_dir)
    tensors, header = checkpoint.read(path)
    model = for_decoding(checkpoint.build_model(tensors, header, path).to(device).eval())
    model.sha256 = header["sha256"]
    return model, tokenizers.from_json(header["tokenizer"])


class Text:
    """The text of one sample from its tokens, in pieces of whole characters, up to the first of the texts `stops`."""

    def __init__(self, tokenizer, stops=(), unshown=b""):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.decoder.setstate((unshown, 0))
        self.held, self.stopped = "", False

    def add(self, token):
        """The text to show after this token. Text that may be the beginning of a stop is held back."""
        return self.released(self.decoder.decode(self.tokenizer.decode_bytes([token])), last=False)

    def end(self):
        shown = self.released(self.decoder.decode(b"", final=True), last=True)
        self.stopped = True
        return shown

    def unshown(self):
        """The bytes at the end that are the beginning of a character; they are not shown any more."""
        begun = self.decoder.getstate()[0]
        self.decoder.reset()
        return begun

    def released(self, text, last):
        if self.stopped:
            return ""
        self.held += text
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            self.stopped, keep = True, 0
            self.held = self.held[: min(places)]
        else:
            keep = 0 if last else max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown


def check_ranges(values, dashes=""):
    """Raise UserError for the first of {name: value} that is out of its range."""
    for name, value in values.items():
        good, must = RANGES[name]
        if not good(value):
            raise UserError(f"{dashes}{name}={value} is out of range: it must be {must}")


def generate_many(
    model,
    tokenizer,
    prompts,
    max_new_tokens=200,
    num_samples=1,
    temperature=0.8,
    top_k=200,
    top_p=1.0,
    stop=(),
    cache="exact",
    seed=1337,
    show=None,
    progress=False,
):
    """The texts that go on from a list of prompts, num_samples from each, without the prompts. An empty prompt stands for the beginning
    of a document. A text depends on its prompt, on seed and on its number among the samples of the prompt.

    stop: texts before which a sample ends; with any, it also ends at its document's end. cache: as decode_n_tokens() takes it.
    show: a function that gets each piece of the first text as it comes, and its number of tokens. progress: show a bar on standard
    error, if that is a terminal. Raises UserError for an argument that is out of range and for a character that the tokenizer lacks."""
    from decoding.generate import decode_n_tokens

    session = None if isinstance(cache, str) else cache
    ranged = dict(max_new_tokens=max_new_tokens, num_samples=num_samples, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    check_ranges(ranged | dict(stop=stop) | ({} if session else dict(cache=cache)))
    if isinstance(prompts, str):
        raise UserError(f"prompts={prompts!r} must be a list of texts; generate() takes one")
    if not prompts:
        return []
    tokens = [tokenizer.encode(prompt) for prompt in prompts]
    if not session or not session.pending:
        tokens = [prompt or [0 if tokenizer.end_token is None else tokenizer.end_token] for prompt in tokens]
    if cache in ("exact", "none") and (longest := max(map(len, tokens))) > model.config.block_size:
        read = model.config.block_size
        print(f"a prompt has {longest:,} tokens: the last {read:,}, the context, are read (--cache=stream reads all)", file=sys.stderr)
    rows = [(prompt, seed + number) for prompt in tokens for number in range(num_samples)]
    texts = [Text(tokenizer, stop, session.unshown if session and prompts == [""] else b"") for _ in rows]
    pieces = [[] for _ in rows]
    end = {tokenizer.end_token} if stop and tokenizer.end_token is not None else ()

    def piece(row, text, tokens):
        pieces[row].append(text)
        if show and row == 0:
            show(text, tokens)

    with tqdm(total=len(rows) * max_new_tokens, unit=" tokens", disable=None if progress else True) as bar:
        for first in range(0, len(rows), BATCH):
            batch = texts[first : first + BATCH]
            drawn = decode_n_tokens(model, *zip(*rows[first : first + BATCH]), max_new_tokens, temperature, top_k, top_p, cache, end)
            for row, token in drawn:
                bar.update()
                piece(first + row, batch[row].end() if token in end else batch[row].add(token), 1)
                if all(text.stopped for text in batch):
                    break
    if session:
        session.unshown = texts[0].unshown()
    for row, text in enumerate(texts):
        piece(row, text.end(), 0)
    return ["".join(row) for row in pieces]


def generate(model, tokenizer, prompt, **how):
    """The text that goes on from a prompt; how: arguments of generate_many()."""
    return generate_many(model, tokenizer, [prompt], **how)[0]


def interactive(model, tokenizer, how):
    """Ask for prompts until the end of input. Ctrl-C ends a sample; while a prompt is asked for, it ends the program."""
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    while True:
        print("\n> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        if not line:
            return
        counts, begin = [], time.perf_counter()

        def show(piece, tokens):
            counts.append(tokens)
            print(piece, end="", flush=True)

        try:
            generate(model, tokenizer, line.rstrip("\n"), show=show, **how)
        except KeyboardInterrupt:
            pass
        except UserError as error:  # a character that the tokenizer does not have
            print(error, file=sys.stderr)
            continue
        seconds = time.perf_counter() - begin
        print(flush=True)
        print(f"[{sum(counts)} tokens, {sum(counts) / seconds:.1f} tokens/s]", file=sys.stderr)


def documents(name, tokenizer, key="text"):
    """Yield (tokens, bytes) of what is to be scored: tokens of which all but the first count, and how many bytes of text those are.
    A file is what data/text/prepare.py takes it for: a text, which is one document, or records, whose texts are under `key`. Those and a
    corpus's documents begin after an end token, which is not counted, and end with one, which is, as in training; where the tokenizer
    has none, their first token is not counted."""
    end = [] if tokenizer.end_token is None else [tokenizer.end_token]
    if not name:
        raise UserError("--score= names no file")
    with sources.rereadable(Path(name), None) as path:
        if path.is_dir():
            if not (path / "meta.json").exists():
                made = f"what `python data/text/prepare.py {path} --out_dir=NEW` makes of it"
                raise UserError(f"no corpus in {path}: --score takes a file, or the folder of a corpus: {made}")
            texts = Corpus(path).documents("val")
        elif (kind := sources.form(path, sources.called(name))[0]) == "text":
            texts, end = ["".join(sources.text_pieces(path, sources.called(name)))], []
        else:
            called = sources.called(name)
            texts = sources.reader(kind, called)(path, called, key, sources.LeftOut())
        for text in texts:
            tokens = [*end, *tokenizer.encode(text), *end]
            yield tokens, len(tokenizer.decode_bytes(tokens[1 : len(tokens) - len(end)]))


def write_score(args, model, tokenizer):
    from decoding.score import loss_of

    window = model.config.block_size
    stride = args.stride or window
    if stride > window:
        raise UserError(f"--stride={stride} must be at most the model's block_size, {window}: tokens between would not be scored")
    loss, count, length, number = 0.0, 0, 0, 0
    say = nullcontext() if args.quiet else waiting("scoring")
    with say, tqdm(unit=" tokens", disable=True if args.quiet else None) as progress:
        for tokens, size in documents(args.score, tokenizer, args.text_key):
            if len(tokens) > 1:
                loss += loss_of(model, tokens, args.cache, stride)
                count, length, number = count + len(tokens) - 1, length + size, number + 1
                progress.update(len(tokens) - 1)
    if not count:
        raise UserError(f"{args.score} holds too little to score: at least 2 tokens are needed")
    windows = f"windows of {window:,} tokens move by {stride:,}"
    context = f": the first {window - stride:,} of a later one are context only" if stride < window else ", none overlaps another"
    print(
        f"loss {loss / count:.4f} nats a token, perplexity {math.exp(min(loss / count, 700)):.2f}, bits per byte "
        f"{loss / math.log(2) / max(1, length):.4f}, {count:,} tokens, {number:,} document{'s' * (number > 1)}, {loss:,.1f} nats in all; "
        + ("each token is predicted from all before it in its document" if args.cache == "stream" else windows + context)
    )


def arguments():
    """The command line. Raises UserError for values that are invalid, alone or together."""
    parser = options = Parser(__doc__)
    options.add_argument("out_dir", metavar="OUT_DIR", help="output folder of train.py, whose best checkpoint is taken, or a checkpoint")
    options = parser.add_argument_group("what to go on from, or to score")
    options.add_argument("--prompt", help="text to go on from (default: the beginning of a document)")
    options.add_argument("--prompt_file", metavar="FILE", help="file that holds it; - for standard input")
    options.add_argument("--prompts", metavar="FILE", help="file of prompts, one a line; - for standard input")
    options.add_argument("--interactive", action="store_true", help="ask for prompts")
    options.add_argument(
        "--score",
        metavar="FILE",
        help="loss, perplexity and bits per byte of a file (- for standard input), a text or records as data/text/prepare.py takes it, or "
        "of the validation documents of a prepared corpus's folder",
    )
    options.add_argument("--text_key", default="text", metavar="NAME", help="with --score: name of the text in a record or row")
    options.add_argument(
        "--stride", type=int, metavar="N", help="with --score: tokens by which a window of block_size moves (default: block_size)"
    )
    options = parser.add_argument_group("how texts are drawn")
    options.add_argument("--max_new_tokens", type=int, default=200, help="tokens to generate (default: %(default)s)")
    options.add_argument("--num_samples", type=int, default=1, help="of each prompt (default: %(default)s)")
    options.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="of the sampling, not of the attention; 0: always the likeliest (default: %(default)s)",
    )
    options.add_argument("--top_k", type=int, default=200, help="only the likeliest K; 0: all (default: %(default)s)")
    options.add_argument("--top_p", type=float, default=1.0, help="only the likeliest that hold P of the mass (default: %(default)s)")
    options.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a sample before this text, or at the document's end; may be given again",
    )
    options = parser.add_argument_group("how they are computed")
    options.add_argument(
        "--cache",
        choices=CACHES,
        default="exact",
        help="exact; stream: memory that does not grow, and a prompt of any length; none: all is computed again "
        "for each token (default: %(default)s)",
    )
    options.add_argument(
        "--session",
        type=Path,
        metavar="FILE",
        help="with --cache=stream: go on from this file, where it exists, and keep the context in it afterwards",
    )
    options.add_argument("--quiet", action="store_true", help="on a terminal, too, the text alone: no prompts, lines and progress")
    options.add_argument(
        "--separator",
        metavar="TEXT",
        help=r"between samples; \n in it is a newline, \0 the character 0 (default: a newline, on a terminal a line of dashes)",
    )
    options.add_argument("--seed", type=int, default=1337, help="(default: %(default)s)")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: %(default)s)")
    args = parser.parse_args()
    check_ranges({name: getattr(args, name) for name in RANGES}, "--")
    texts = ("prompt", "prompt_file", "prompts", "interactive", "score")
    if len(given := [f"--{name}" for name in texts if getattr(args, name) not in (None, False)]) > 1:
        raise UserError(f"give {' or '.join(given)}, not both")
    if args.session and (args.cache != "stream" or args.num_samples > 1 or args.prompts or args.interactive or args.score):
        raise UserError("--session goes with --cache=stream, one prompt and one sample")
    if args.session and not os.access(folder := args.session.absolute().parent, os.W_OK):
        raise UserError(f"--session={args.session}: {'cannot write to' if folder.exists() else 'there is no'} {folder}")
    parser.refuse_given(args, ("stride", "text_key") if args.score is None else (), "is for --score: leave it out")
    if args.stride and args.cache == "stream":
        raise UserError(f"--stride={args.stride} moves windows, and --cache=stream has none: leave one of them out")
    drawing = ("max_new_tokens", "num_samples", "temperature", "top_k", "top_p", "stop", "separator", "seed")
    parser.refuse_given(args, drawing if args.score is not None else (), "is for drawing samples, and --score draws none: leave it out")
    if args.interactive and args.num_samples > 1:
        raise UserError("--interactive shows one sample of each prompt: leave --num_samples out")
    return args


def prompts_of(args):
    """The texts to go on from."""
    if args.prompts is not None:
        lines = read_text(args.prompts)
        if not lines:
            raise UserError(f"{args.prompts} holds no prompt")
        return lines.removesuffix("\n").split("\n")
    if args.prompt_file is not None:
        return [read_text(args.prompt_file)]
    return [(args.prompt or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")]


def main():
    args = arguments()
    with waiting("loading the model"):
        model, tokenizer = load(args.out_dir, args.device)
    sys.stdout.reconfigure(encoding="utf-8")
    how = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "stop", "cache", "seed")}
    if args.interactive:
        return interactive(model, tokenizer, how)
    if args.score is not None:
        return write_score(args, model, tokenizer)
    if args.session:
        from decoding.cache import StreamCache, make_cache

        how["cache"] = make_cache("stream", model.config, model.head.weight.device)
        if args.session.exists():
            how["cache"] = StreamCache.load(args.session, model, model.sha256)
            if any(len(x) != 1 for x in how["cache"].kept.values()):
                raise UserError(f"{args.session} holds several samples: --session goes on from one")
    prompts = prompts_of(args)

    terminal = sys.stdout.isatty()
    framed = terminal and not args.quiet
    separator = (LINE if framed else "\n") if args.separator is None else args.separator.replace("\\n", "\n").replace("\\0", "\0")
    before = [prompt if framed else "" for prompt in prompts for _ in range(args.num_samples)]
    show = None
    if terminal:
        print(before[0], end="", flush=True)
        show = lambda piece, _: print(piece, end="", flush=True)
    progress = not (terminal or args.quiet)
    with waiting("generating") if progress else nullcontext():
        texts = generate_many(model, tokenizer, prompts, num_samples=args.num_samples, show=show, progress=progress, **how)
    samples = [prompt + text for prompt, text in zip(before, texts)]
    if terminal:
        samples[0] = ""  # it is there already
    print(separator.join(samples), end="\n" if terminal else "")
    if args.session:
        how["cache"].save(args.session, model.sha256)


if __name__ == "__main__":
    run(main)
