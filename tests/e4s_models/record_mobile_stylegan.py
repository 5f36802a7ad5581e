"""Records what the published graph computes, for test_mobile_stylegan: `python tests/e4s_models/record_mobile_stylegan.py`.

Needs openvino (an extra of [dev]); asks it for float32, since it may choose bfloat16 by itself.
"""

from pathlib import Path

import numpy as np

from e4s_models.weights import weight_path

RECORDED = Path(__file__).parents[1] / "data" / "mobile_stylegan.npz"


def main() -> None:
    import openvino

    core, exact = openvino.Core(), {"INFERENCE_PRECISION_HINT": "f32"}
    mapping = core.compile_model(weight_path("mobile_stylegan_mapping_xml"), "CPU", exact)
    synthesis = core.compile_model(weight_path("mobile_stylegan_synthesis_xml"), "CPU", exact)
    z = np.random.Generator(np.random.PCG64(20)).standard_normal((3, 512), np.float32)
    w = np.concatenate([mapping(code[None])[0] for code in z])  # (3, 512)
    images = np.concatenate([synthesis(code[None])[0] for code in w[:2]])  # (2, 3, 1024, 1024)
    np.savez_compressed(
        RECORDED,
        z=z,
        w=w,
        image_sub=images[:, :, 5::32, 7::32],
        image_crop=images[:, :, 496:528, 496:528],
        image_stats=np.stack([images.mean((1, 2, 3)), images.std((1, 2, 3)), images.min((1, 2, 3)), images.max((1, 2, 3))]),
    )


if __name__ == "__main__":
    main()
