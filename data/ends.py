"""Two small tasks for lm_eval, the evaluation harness, made of a corpus's held-out documents: which of four ends is the right one, and the
loss of the text.

    python data/ends.py data/mine
    lm_eval --model=hf --model_args=pretrained=DIR,trust_remote_code=True --include_path=data/mine --tasks=ends,held_out

DIR is a folder that export.py has written. Written beside the corpus: ends.jsonl, a beginning, four ends and the right one's number in a
line, and held_out.txt, with a .yaml each, which tells lm_eval of them. Nothing is downloaded."""

import json
import random
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Parser, UserError, refuse_existing, replacing, run
from data.corpus import Corpus

LEAST, TRIES = 20, 100  # characters of an end; draws of three others, of which some may end alike
TASKS = {
    "ends": """\
task: ends
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: beginning
doc_to_choice: ends
doc_to_target: right
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
""",
    "held_out": """\
task: held_out
dataset_path: text
dataset_kwargs:
  data_files:
    test: {path}
  sample_by: document
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text[1:]}}}}"
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
metadata:
  version: 1
""",
}  # held_out.txt begins with a newline, which stands where lm_eval puts the token of a beginning: the windows of both are then the same


def halves(text):
    """(beginning, end) of a text, cut at the first blank after its middle; the end has that blank."""
    cut = next((at for at in range(len(text) // 2, len(text)) if text[at].isspace()), len(text))
    return text[:cut], text[cut:]


def shortened(end, length):
    """An end, cut to a length of characters at most, after a word."""
    if len(end) <= length:
        return end
    cut = max((at for at in range(LEAST // 2, length + 1) if end[at].isspace()), default=length)
    return end[:cut]


def questions(texts, length, seed):
    """[{"beginning", "ends", "right"}] of the texts that are long enough: what comes before a text's middle, and its own end among those of
    three others, in any order, all about as long as the shortest of the four. Raises UserError if no four ends differ."""
    cut, found, draw = [pair for pair in map(halves, texts) if len(pair[1]) >= LEAST], [], random.Random(seed)
    for beginning, end in cut if len(cut) > 3 else ():
        for _ in range(TRIES):
            ends = [end, *(other for _, other in draw.sample(cut, 3))]
            most = min(length, *map(len, ends))
            ends = [shortened(end, most) for end in ends]
            if len(set(ends)) == 4:
                order = draw.sample(range(4), 4)
                found.append({"beginning": beginning[-2 * length :], "ends": [ends[n] for n in order], "right": order.index(0)})
                break
    if not found:
        raise UserError(
            f"four held-out documents of {2 * LEAST} characters or more, with different ends, are needed; {len(cut)} are so long"
        )
    return found


def main():
    options = Parser(__doc__)
    options.add_argument("data_dir", type=Path, metavar="DATA_DIR", help="a prepared corpus")
    options.add_argument("--documents", type=int, default=500, help="held-out documents to take, at most (default: %(default)s)")
    options.add_argument(
        "--length",
        type=int,
        default=120,
        help="characters of an end, at most, and half of those of a beginning; both together are to fit the context (default: %(default)s)",
    )
    options.add_argument("--seed", type=int, default=0, help="of the wrong ends and the order (default: %(default)s)")
    options.add_argument("--overwrite", action="store_true", help="replace the tasks that are there already")
    args = options.parse_args()
    for name, least in (("documents", 4), ("length", LEAST)):
        if not least <= (value := getattr(args, name)) < 2**31:
            raise UserError(f"--{name}={value} must be at least {least}, and below 2^31")
    corpus = Corpus(args.data_dir)
    paths = {"ends": args.data_dir / "ends.jsonl", "held_out": args.data_dir / "held_out.txt"}
    for path in paths.values():
        refuse_existing(path, args.overwrite)
        refuse_existing(path.with_suffix(".yaml"), args.overwrite)
    texts = list(islice(corpus.documents("val"), args.documents))
    lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in questions(texts, args.length, args.seed)]
    contents = {"ends": "".join(lines), "held_out": "\n" + "\n\n".join(texts)}
    for name, path in paths.items():
        with replacing(path) as temporary:
            temporary.write_text(contents[name], encoding="utf-8", newline="")
        with replacing(path.with_suffix(".yaml")) as temporary:
            temporary.write_text(TASKS[name].format(path=json.dumps(str(path.resolve()))), encoding="utf-8")
    print(f"{paths['ends']}: {len(lines):,} questions")
    print(f"{paths['held_out']}: {len(texts):,} documents, {len(contents['held_out'].encode()):,} bytes")


if __name__ == "__main__":
    run(main)
