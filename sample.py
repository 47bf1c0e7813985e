"""Sample from a trained model.

    python sample.py out/quickstart --prompt="The list object" --max_new_tokens=100 --num_samples=3
    python sample.py out/quickstart --prompts=FILE       a prompt a line, their samples one after another
    python sample.py out/quickstart --interactive        asks for prompts; Ctrl-C stops a sample
    python sample.py out/quickstart --score=FILE         loss, perplexity and bits per byte of a text

Writes the generated text, without the prompt, to standard output; on a terminal as it comes. Several samples are
generated as one batch and written one after another."""

import codecs
import math
import os
import sys
import time
from pathlib import Path

from common import Parser, UserError, choose_device, read_text, run  # isort: skip, for it tells of packages that are missing
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import tokenizer as tokenizers
from decoding.cache import StreamCache, make_cache
from decoding.generate import PIECE, decode_n_tokens, for_decoding
from training import checkpoint

BATCH = 64  # samples generated at a time


class Text:
    """The text of one sample from its tokens, in pieces of whole characters, up to the first of the texts `stops`."""

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held, self.stopped = "", False

    def add(self, token):
        """The text to show after this token. Text that may be the beginning of a stop is held back."""
        return self.released(self.decoder.decode(self.tokenizer.decode_bytes([token])), last=False)

    def end(self):
        shown = self.released(self.decoder.decode(b"", final=True), last=True)
        self.stopped = True
        return shown

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


def prompt_tokens(text, tokenizer):
    """The tokens of a prompt; an empty one stands for the beginning of a document."""
    return tokenizer.encode(text) or [0 if tokenizer.end_token is None else tokenizer.end_token]


def samples(args, model, tokenizer, prompts, session=None, show=None):
    """The texts, num_samples per prompt. show(piece, tokens) gets each piece of the first text as it comes, and its number of tokens."""
    rows = [(prompt, args.seed + number) for prompt in prompts for number in range(args.num_samples)]
    texts, pieces = [Text(tokenizer, args.stop) for _ in rows], [[] for _ in rows]
    stop = {tokenizer.end_token} if args.stop and tokenizer.end_token is not None else ()

    def piece(row, text, tokens):
        pieces[row].append(text)
        if show and row == 0:
            show(text, tokens)

    with tqdm(total=len(rows) * args.max_new_tokens, unit=" tokens", disable=True if show else None) as progress:
        for first in range(0, len(rows), BATCH):
            batch = texts[first : first + BATCH]
            for row, token in decode_n_tokens(
                model,
                *zip(*rows[first : first + BATCH]),
                args.max_new_tokens,
                args.temperature,
                args.top_k,
                args.top_p,
                session or args.cache,
                stop,
            ):
                progress.update()
                piece(first + row, batch[row].end() if token in stop else batch[row].add(token), 1)
                if all(text.stopped for text in batch):
                    break
    for row, text in enumerate(texts):
        piece(row, text.end(), 0)
    return ["".join(row) for row in pieces]


def interactive(args, model, tokenizer):
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
            samples(args, model, tokenizer, [prompt_tokens(line.rstrip("\n"), tokenizer)], show=show)
        except KeyboardInterrupt:
            pass
        except UserError as error:  # a character that the tokenizer does not have
            print(error, file=sys.stderr)
            continue
        seconds = time.perf_counter() - begin
        print(flush=True)
        print(f"[{sum(counts)} tokens, {sum(counts) / seconds:.1f} tokens/s]", file=sys.stderr)


@torch.no_grad()
def score(model, tokens, cache_name):
    """The mean loss, in nats per token, of all tokens of a list but the first: each is predicted from all before it with
    cache "stream", else from those before it in its window of block_size tokens. Apart from the tokens themselves, memory
    does not grow with the text."""
    device, total = model.head.weight.device, 0.0
    endless = cache_name == "stream"
    window = len(tokens) if endless else model.config.block_size
    for begin in tqdm(range(0, len(tokens) - 1, window), unit=" windows", disable=None):
        cache = make_cache(cache_name if endless else "plain", model.config, device)
        for start in range(begin, min(begin + window, len(tokens) - 1), PIECE):
            stop = min(start + PIECE, begin + window, len(tokens) - 1)
            idx, targets = (torch.tensor([tokens[start + s : stop + s]], device=device) for s in (0, 1))
            total += F.cross_entropy(model.logits(model(idx, cache=cache, head=False))[0], targets[0], reduction="sum").item()
    return total / (len(tokens) - 1)


def arguments():
    """The command line. Raises UserError for values that are invalid, alone or together."""
    options = Parser(__doc__)
    options.add_argument("out_dir", metavar="OUT_DIR", help="output folder of train.py, whose best checkpoint is taken, or a checkpoint")
    options.add_argument("--prompt", help="text to go on from (default: the beginning of a document)")
    options.add_argument("--prompt_file", metavar="FILE", help="file that holds it; - for standard input")
    options.add_argument("--prompts", metavar="FILE", help="file of prompts, one a line; - for standard input")
    options.add_argument("--interactive", action="store_true", help="ask for prompts")
    options.add_argument("--score", metavar="FILE", help="loss, perplexity and bits per byte of a text; - for standard input")
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
    options.add_argument(
        "--cache",
        choices=("exact", "stream", "none"),
        default="exact",
        help="exact; stream: memory that does not grow, and a context without an end; none: all is computed again "
        "for each token (default: %(default)s)",
    )
    options.add_argument(
        "--session",
        type=Path,
        metavar="FILE",
        help="with --cache=stream: go on from this file, where it exists, and keep the context in it afterwards",
    )
    options.add_argument("--seed", type=int, default=1337, help="(default: %(default)s)")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: %(default)s)")
    args = options.parse_args()
    for name, good in (
        ("max_new_tokens", 0 <= args.max_new_tokens < 2**31),
        ("num_samples", 1 <= args.num_samples <= 4096),
        ("temperature", 0 <= args.temperature < float("inf")),
        ("top_k", args.top_k >= 0),
        ("top_p", 0 < args.top_p <= 1),
        ("seed", 0 <= args.seed < 2**31),
        ("stop", all(args.stop)),
    ):
        if not good:
            raise UserError(f"--{name}={getattr(args, name)} is out of range (--help lists the options)")
    sources = ("prompt", "prompt_file", "prompts", "interactive", "score")
    if len(given := [f"--{name}" for name in sources if getattr(args, name) not in (None, False)]) > 1:
        raise UserError(f"give {' or '.join(given)}, not both")
    if args.session and (args.cache != "stream" or args.num_samples > 1 or args.prompts or args.interactive or args.score):
        raise UserError("--session goes with --cache=stream, one prompt and one sample")
    if args.session and not os.access(folder := args.session.absolute().parent, os.W_OK):
        raise UserError(f"--session={args.session}: {'cannot write to' if folder.exists() else 'there is no'} {folder}")
    if args.interactive and args.num_samples > 1:
        raise UserError("--interactive shows one sample of each prompt: leave --num_samples out")
    return args


def write_score(args, model, tokenizer):
    tokens = tokenizer.encode(read_text(args.score))
    if len(tokens) < 2:
        raise UserError(f"{args.score} holds {len(tokens)} tokens: at least 2 are needed")
    loss = score(model, tokens, args.cache)
    scored_bytes = len(tokenizer.decode_bytes(tokens[1:]))
    print(
        f"loss {loss:.4f} nats a token, perplexity {math.exp(min(loss, 700)):.2f}, bits per byte "
        f"{loss * (len(tokens) - 1) / math.log(2) / max(1, scored_bytes):.4f}, {len(tokens) - 1:,} tokens"
    )


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
    device = choose_device(args.device)
    path = checkpoint.find(args.out_dir)
    tensors, header = checkpoint.read(path)
    tokenizer = tokenizers.from_json(header["tokenizer"])
    model = for_decoding(checkpoint.build_model(tensors, header, path).to(device).eval())
    sys.stdout.reconfigure(encoding="utf-8")
    if args.interactive:
        return interactive(args, model, tokenizer)
    if args.score is not None:
        return write_score(args, model, tokenizer)
    session = make_cache("stream", model.config, device) if args.session else None
    if session and args.session.exists():
        session = StreamCache.load(args.session, model.config, header["sha256"])
    if session and session.pending:  # an empty prompt adds nothing
        prompts = [tokenizer.encode(prompt) for prompt in prompts_of(args)]
    else:
        prompts = [prompt_tokens(prompt, tokenizer) for prompt in prompts_of(args)]

    terminal = sys.stdout.isatty()
    texts = samples(args, model, tokenizer, prompts, session, (lambda piece, _: print(piece, end="", flush=True)) if terminal else None)
    print("\n".join(["" if terminal else texts[0], *texts[1:]]), end="\n" if terminal else "")
    if session:
        session.save(args.session, header["sha256"])


if __name__ == "__main__":
    run(main)
