"""Sample from a trained model.

    python sample.py out/quickstart --prompt="The list object" --max_new_tokens=100 --num_samples=3

Writes the generated text, without the prompt, to standard output; on a terminal as it comes. Several samples are
generated as one batch and written one after another."""

import codecs
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
from common import Parser, UserError, choose_device, run
from data import tokenizer as tokenizers
from model import Cache


def probabilities(logits, temperature, top_k, top_p):
    """(B, V) float64 of logits (B, V): divided by the temperature, then cut to the top_k most likely tokens (0: all),
    then to the fewest of those that hold top_p of the mass. temperature 0: all mass on the most likely token."""
    logits = logits.double()
    logits = logits - logits.amax(-1, keepdim=True)
    if temperature == 0:
        return torch.zeros_like(logits).scatter(1, logits.argmax(-1, keepdim=True), 1.0)
    ordered, order = (logits / temperature).sort(descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = float("-inf")
    p = ordered.softmax(-1)
    p[p.cumsum(-1) - p >= top_p] = 0
    return torch.zeros_like(p).scatter(1, order, p / p.sum(-1, keepdim=True))


def sample(p, generators):
    """One token (B, 1) from each row of p (B, V) on the CPU, row i by generators[i] alone: what a sample becomes does
    not depend on the others in its batch."""
    u = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])[:, None]
    cumulated = p.cumsum(-1)
    return torch.searchsorted(cumulated, u * cumulated[:, -1:], right=True).clamp_max(p.size(1) - 1)


def prefill(model, tokens):
    """(logits (B, V) of the next token, cache) after tokens (B, T)."""
    cache = Cache(model.config)
    return model(tokens, cache=cache)[:, -1], cache


def decode_one_token(model, token, cache):
    """Logits (B, V) of the next token, after one more token (B, 1)."""
    return model(token, cache=cache)[:, -1]


@torch.no_grad()
def generate(model, prompt, max_new_tokens, temperature, top_k, top_p, seed):
    """Yield max_new_tokens times the next tokens (B,), on the CPU, after prompt (B, T >= 1) on the model's device.

    The context is at most block_size tokens: of a longer prompt the last ones, and whenever it is full it starts again
    from its last half."""
    block_size = model.config.block_size
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompt))]
    context = prompt[:, -block_size:]
    if max_new_tokens:
        logits, cache = prefill(model, context)
    for produced in range(1, max_new_tokens + 1):
        token = sample(probabilities(logits.cpu(), temperature, top_k, top_p), generators)
        yield token[:, 0]
        if produced == max_new_tokens:
            return
        token = token.to(prompt.device)
        context = torch.cat([context, token], 1)
        if context.size(1) > block_size:
            context = context[:, -(block_size // 2 or 1):]
            logits, cache = prefill(model, context)
        else:
            logits = decode_one_token(model, token, cache)


def prompt_tokens(args, tokenizer):
    """The tokens of the prompt; an empty one stands for the beginning of a document."""
    if args.prompt_file == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
    elif args.prompt_file:
        text = Path(args.prompt_file).read_bytes().decode("utf-8", "replace")
    else:
        text = args.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if text:
        return tokenizer.encode(text)
    return [0 if tokenizer.end_token is None else tokenizer.end_token]


def main():
    options = Parser(__doc__)
    options.add_argument("out_dir", metavar="OUT_DIR", help="output folder of train.py; its best checkpoint is taken")
    options.add_argument("--prompt", default="", help="text to go on from (default: the beginning of a document)")
    options.add_argument("--prompt_file", help="file that holds it; - for standard input")
    options.add_argument("--max_new_tokens", type=int, default=200, help="tokens to generate (default: %(default)s)")
    options.add_argument("--num_samples", type=int, default=1, help="(default: %(default)s)")
    options.add_argument("--temperature", type=float, default=0.8,
                         help="of the sampling, not of the attention; 0: always the likeliest (default: %(default)s)")
    options.add_argument("--top_k", type=int, default=200, help="only the likeliest K; 0: all (default: %(default)s)")
    options.add_argument("--top_p", type=float, default=1.0, help="only the likeliest that hold P of the mass "
                                                                  "(default: %(default)s)")
    options.add_argument("--seed", type=int, default=1337, help="(default: %(default)s)")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: %(default)s)")
    args = options.parse_args()
    for name, good in (("max_new_tokens", 0 <= args.max_new_tokens < 2**31), ("num_samples", 1 <= args.num_samples <= 4096),
                       ("temperature", 0 <= args.temperature < float("inf")), ("top_k", args.top_k >= 0),
                       ("top_p", 0 < args.top_p <= 1), ("seed", 0 <= args.seed < 2**31)):
        if not good:
            raise UserError(f"--{name}={getattr(args, name)} is out of range (--help lists the options)")
    if args.prompt and args.prompt_file:
        raise UserError("give --prompt or --prompt_file, not both")

    device = choose_device(args.device)
    path = checkpoint.find(args.out_dir)
    tensors, header = checkpoint.read(path)
    tokenizer = tokenizers.from_json(header["tokenizer"])
    prompt = torch.tensor([prompt_tokens(args, tokenizer)], device=device).expand(args.num_samples, -1)
    model = checkpoint.build_model(tensors, header, path).to(device).eval()

    stream = sys.stdout.isatty()
    sys.stdout.reconfigure(encoding="utf-8")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    steps = generate(model, prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    columns = []
    for tokens in tqdm(steps, total=args.max_new_tokens, unit=" tokens", disable=True if stream else None):
        columns.append(tokens)
        if stream:
            print(decoder.decode(tokenizer.decode_bytes([tokens[0].item()])), end="", flush=True)
    rows = torch.stack(columns, 1).tolist() if columns else [[]] * args.num_samples
    texts = [tokenizer.decode_bytes(row).decode("utf-8", "replace") for row in rows]
    first = decoder.decode(b"", final=True) if stream else texts[0]
    print("\n".join([first, *texts[1:]]), end="\n" if stream else "")


if __name__ == "__main__":
    run(main)
