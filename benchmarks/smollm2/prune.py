"""Drop the rarest rows of a drafter's head, so that its files fit a size.

    python benchmarks/smollm2/prune.py DRAFTER ANSWERS OUT --draft-vocab-size 11520

ANSWERS is the folder of answers that train.py wrote; its token counts say which rows are rare. End-of-turn stays.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

from hf_eagle3 import Eagle3DrafterConfig, Eagle3DrafterModel
from hf_eagle3.modeling.fields_eagle3 import FIELD_NAMES
from hf_eagle3.training import choose_draft_vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--draft-vocab-size", type=int, required=True)
    args = parser.parse_args()
    drafter = AutoModel.from_pretrained(args.drafter, dtype=torch.bfloat16)
    config, ids = drafter.config, drafter.draft_to_target_ids
    counts = torch.zeros(config.vocab_size, dtype=torch.int64)
    for file in sorted(args.answers.glob("train_*.npz")):
        answer_ids = np.load(file)["answer_ids"]
        counts += torch.from_numpy(np.bincount(answer_ids, minlength=config.vocab_size))
    keep = choose_draft_vocabulary(
        counts[ids], args.draft_vocab_size, always=(ids == config.eos_token_id).nonzero().flatten().tolist()
    )
    fields = {name: getattr(config, name) for name in FIELD_NAMES}
    fields["draft_vocab_size"] = args.draft_vocab_size
    pruned = Eagle3DrafterModel(Eagle3DrafterConfig(**fields)).to(torch.bfloat16)
    weights = drafter.state_dict() | {"lm_head.weight": drafter.lm_head.weight[keep], "d2t": pruned.d2t}
    pruned.load_state_dict(weights)
    pruned.set_draft_to_target_ids(ids[keep])
    pruned.generation_config = drafter.generation_config
    pruned.save_pretrained(args.out, max_shard_size="13MB")
    print(f"{args.out}: {counts[ids[keep]].sum() / counts.sum():.4f} of the answer tokens can be proposed")


if __name__ == "__main__":
    main()
