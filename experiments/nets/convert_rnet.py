"""Convert mtcnn's R-Net from a pickle to safetensors (needed once; the result is in `weights/`).

`pip install --no-deps mtcnn==1.0.0; pip install joblib lz4`, then `python -m experiments.nets.convert_rnet` writes
`weights/rnet.safetensors`. The package itself needs TensorFlow and is not imported. Its pickle is read only where its hash is
the one below, because reading a pickle runs what it holds.
"""

import hashlib
import importlib.util
import io
import sys
from pathlib import Path

from experiments.nets.rnet import WEIGHTS
from varscale import transfer

SHA256 = "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee"

# The order of the arrays in the pickle is that of Keras' `Model.get_weights`.
NAMES = (
    *(
        f"{layer}{number}/{name}"
        for number in (1, 2, 3)
        for layer, name in (("conv", "kernel"), ("conv", "bias"), ("prelu", "alpha"))
    ),
    *("fc4/kernel", "fc4/bias", "prelu4/alpha", "fc5-1/kernel", "fc5-1/bias", "fc5-2/kernel", "fc5-2/bias"),
)


def main() -> None:
    """Read the installed package's file, check it, write ours."""
    spec = importlib.util.find_spec("mtcnn")
    if spec is None or spec.origin is None:
        sys.exit("the package mtcnn is not installed: pip install --no-deps mtcnn==1.0.0")
    content = (Path(spec.origin).parent / "assets" / "weights" / "rnet.lz4").read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"rnet.lz4 of {spec.origin} is not the file this script knows (mtcnn 1.0.0); it is a pickle, and is not read")
    import joblib

    arrays = joblib.load(io.BytesIO(content))
    transfer.save(WEIGHTS, dict(zip(NAMES, arrays, strict=True)))


if __name__ == "__main__":
    main()
