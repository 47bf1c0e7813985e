"""What sizes fit a text: of the vocabulary, the validation split, the graph, the model and the run, as runs/own_text.sh takes them.

    python data/sizes.py FILE_OR_FOLDER ... [--key=value ...]      before the text is prepared
    python data/sizes.py --data_dir=DIR [--key=value ...]          after it; the values that are given are kept

Prints a line of shell for each: name=value, and after it where the value comes from and the option that gives another."""

import math
import os
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Parser, UserError, run, waiting
from data.corpus import Corpus
from ops.model_config import ModelConfig, chosen_heads

DOCUMENTS = 20_000  # that are embedded, at most
LEAST = 4  # tokens of context: the convolution's taps
TOKENS_A_STEP, STEPS = 2048, 1000  # of minutes on two cores
PASSES = 10  # over the text, at most; past that a model of this size learns it by heart


def power_of_two(number, least, most):
    """The greatest power of two up to `number`, kept between `least` and `most`."""
    return min(max(2 ** int(math.log2(max(number, 1))), least), most)


def size_on_disk(paths):
    """Bytes of files and of all files in folders."""
    size = 0
    for path in map(Path, paths):
        files = [path] if path.is_file() else [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
        size += sum(file.stat().st_size for file in files if file.is_file())
    return size


def common_words(texts):
    """How many words occur in two texts or more, 50,000 at most: those that latent semantic analysis (data/embed.py) has."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        return len(TfidfVectorizer(min_df=2, max_features=50_000).fit(texts).vocabulary_)
    except UserError:  # a damaged corpus; UserError is a ValueError too
        raise
    except ValueError:  # there is none
        return 0


def of_files(size, given):
    """[(name, value, why)] of what data/text/prepare.py must know of a text of `size` bytes, or None where that is not known. given:
    {name: text} of its options."""
    vocab_size, why = power_of_two((1 << 30 if size is None else size) / 700, 320, 8192), "tokens at most"
    if "vocab_size" not in given:
        why += ", for a data set whose size is not known" if size is None else ": one for every 700 bytes or more, as a power of two"
    val_fraction = 0.05 if size is None or size > 1_000_000 else 0.1
    sizes = [("val_fraction", given.get("val_fraction", val_fraction), "of the text is for validation")]
    if given.get("tokenizer", "bpe") == "bpe":
        sizes.insert(0, ("vocab_size", given.get("vocab_size", vocab_size), why))
    return sizes


def of_corpus(train, val, documents, words, given, characters=False):
    """[(name, value, why)] of graph, model and run for `train` and `val` tokens, `documents` training documents and `words` that
    two of them or more have. given: {name: value} of the settings that are not to be chosen. characters: the tokens are characters,
    among which recall heads gain nothing. Raises UserError for too little text."""
    longest = min(val - 1, train // 4)
    if longest < LEAST:
        raise UserError(f"{train} tokens to train on and {val} for validation are too few: {4 * LEAST} and {LEAST + 1} are needed at least")
    n_embd = given.get("n_embd", 128 if train >= 50_000 else 64)
    heads = chosen_heads(given, characters)
    head = max(2, n_embd // max(heads["n_head"], 1))  # features of a head
    known = min(documents, DOCUMENTS, words)
    features = next((features for features in (n_embd, head) if features < known), 0)
    found = f"{documents:,} documents with {words:,} words that two of them share"
    if features:
        why = f"of the graph{'' if features == n_embd else ', the same for every head'}: fewer than there are of {found}"
    else:
        why = "of every head, in a chain: no domain's graph can be made of " + (
            "one document (--split_on='\\n\\n' makes one of each paragraph)" if documents == 1 else found
        )
    block_size = given.get("block_size", power_of_two(longest, LEAST, 128))
    batch_size = given.get("batch_size", 16)
    step = batch_size * block_size * given.get("grad_accum_steps", 1)
    fitting = math.ceil(PASSES * train / max(step, 1))
    max_steps = given.get("max_steps", min(max(fitting, STEPS // 10), STEPS))
    passes = max_steps * step / train
    seen = f"{passes:.1f} passes over the text"
    if passes < 1:
        seen = f"{passes:.1%} of the text is seen; --max_steps={math.ceil(train / max(step, 1))} sees all of it once"
    return [
        ("features", features or head, why),
        ("graph", "domain" if features else "chain", "of the features"),
        ("n_layer", given.get("n_layer", 4 if train >= 50_000 else 2), "blocks"),
        ("n_embd", n_embd, "wide"),
        ("n_head", heads["n_head"], "heads"),
        ("local_heads", heads["local_heads"], "of the heads see the last 16 tokens only"),
        ("recall_heads", heads["recall_heads"], "of the heads look for what followed the same tokens before"),
        ("block_size", block_size, f"tokens of context; {train:,} tokens to train on, {val:,} for validation"),
        ("batch_size", batch_size, "sequences a step"),
        ("max_steps", max_steps, f"of {step:,} tokens: {seen}"),
        ("warmup_steps", given.get("warmup_steps", max_steps // 10), "of these warm up"),
        ("lr_decay_steps", given.get("lr_decay_steps", max(1, max_steps)), "until the learning rate is at its lowest"),
        ("eval_interval", given.get("eval_interval", max(1, max_steps // 10)), "steps between validations"),
    ]


def main():
    options = Parser(__doc__)
    options.add_argument("paths", nargs="*", metavar="FILE_OR_FOLDER", help="the text, before it is prepared")
    options.add_argument("--data_dir", type=Path, help="the prepared corpus")
    args, more = options.parse_known_args()
    if not (args.paths or args.data_dir):
        options.error("the following arguments are required: FILE_OR_FOLDER")
    given = dict(option.lstrip("-").replace("-", "_").split("=", 1) for option in more if "=" in option)
    if args.data_dir:
        corpus = Corpus(args.data_dir)
        given = {name: int(value) for name, value in given.items() if value.isascii() and value.isdigit()}
        with waiting("counting words that two documents share"):
            words = common_words(islice(corpus.documents("train"), DOCUMENTS))
        sizes = of_corpus(
            len(corpus.train), len(corpus.val), corpus.meta["train"]["documents"], words, given, corpus.meta.get("tokenizer") == "char"
        )
        names = ("n_layer", "n_embd", "n_head", "local_heads", "recall_heads", "block_size")
        ModelConfig(**{name: value for name, value, _ in sizes if name in names})
    elif any((Path(path) / "train.bin").exists() for path in args.paths):
        if name := next((name for name in ("vocab_size", "val_fraction") if name in given), None):
            raise UserError(f"--{name}={given[name]} is nothing for nanoGPT's tokens, which stay as they are: leave it out")
        return
    else:
        known = all(Path(path).exists() for path in args.paths)
        sizes = of_files(size_on_disk(args.paths) if known else None, given)
    for name, value, why in sizes:
        option = {"features": "n_embd=N", "graph": "laplacian=FILE"}.get(name, f"{name}=N")
        print(f"{f'{name}={value}':<22} # {why}; --{option} gives another")


if __name__ == "__main__":
    run(main)
