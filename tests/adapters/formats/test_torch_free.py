"""What an adapter's names, config and header mean is decided without torch."""

import subprocess
import sys

TORCH_FREE = (
    "declared_base",
    "digest",
    "limits",
    "peft.config",
    "peft.selection",
    "peft.tensors",
    "safetensors_header",
)


def test_deciding_modules_do_not_import_torch() -> None:
    imports = "; ".join(f"import loramux_adapters.formats.{name}" for name in TORCH_FREE)
    code = f"import sys; {imports}; print(sorted({{'torch', 'numpy', 'safetensors'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
