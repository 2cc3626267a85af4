"""Names for published models: network, guiding network, strength of model guidance."""

from __future__ import annotations

from dataclasses import dataclass

EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/{}.pkl"
EDM2_URL = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/{}.pkl"
SHIPPED = "shipped:"
"""Prefix of a source that lies in the package's own data folder."""


@dataclass(frozen=True)
class Preset:
    """A published model with the settings it was published with.

    Attributes:
        net: source of the network: a URL, or the name of a shipped file.
        gnet: source of the guiding network, or None.
        guidance: strength of model guidance; 1 when there is no `gnet`.
        published: the score its authors report, for orientation.
        erk: (w_stiff, w_con) that was measured to help at every step count tried, or None.
    """

    net: str
    gnet: str | None = None
    guidance: float = 1.0
    published: str = ""
    erk: tuple[float, float] | None = None


def _edm(*names: str) -> dict[str, Preset]:
    return {name: Preset(EDM_URL.format(name)) for name in names}


def _edm2(table: str) -> dict[str, Preset]:
    """Read rows of `name net gnet guidance metric score`; '-' is none, '~' is edm2-img512-."""
    presets = {}
    for row in table.split("\n"):
        if not row.strip():
            continue
        name, net, gnet, guidance, metric, score = row.replace("~", "edm2-img512-").split()
        presets[name] = Preset(
            EDM2_URL.format(net),
            None if gnet == "-" else EDM2_URL.format(gnet),
            1.0 if guidance == "-" else float(guidance),
            f"{metric} {score}",
        )
    return presets


PRESETS: dict[str, Preset] = {
    "digits": Preset(SHIPPED + "digits.safetensors", erk=(0.5, 0.5)),  # docs/digits.md
    "digits-guid": Preset(SHIPPED + "digits.safetensors", "uncond:digits", 1.5),
    "digits-autog": Preset(
        SHIPPED + "digits.safetensors", SHIPPED + "digits-weak.safetensors", 1.5
    ),
    **_edm(
        "edm-cifar10-32x32-uncond-vp",
        "edm-cifar10-32x32-cond-vp",
        "edm-ffhq-64x64-uncond-vp",
        "edm-afhqv2-64x64-uncond-vp",
        "edm-imagenet-64x64-cond-adm",
    ),
    **_edm2("""
~xs-fid               ~xs-2147483-0.135           -                           -    FID 3.53
~xs-dino              ~xs-2147483-0.200           -                           -    FD-DINOv2 103.39
~s-fid                ~s-2147483-0.130            -                           -    FID 2.56
~s-dino               ~s-2147483-0.190            -                           -    FD-DINOv2 68.64
~m-fid                ~m-2147483-0.100            -                           -    FID 2.25
~m-dino               ~m-2147483-0.155            -                           -    FD-DINOv2 58.44
~l-fid                ~l-1879048-0.085            -                           -    FID 2.06
~l-dino               ~l-1879048-0.155            -                           -    FD-DINOv2 52.25
~xl-fid               ~xl-1342177-0.085           -                           -    FID 1.96
~xl-dino              ~xl-1342177-0.155           -                           -    FD-DINOv2 45.96
~xxl-fid              ~xxl-0939524-0.070          -                           -    FID 1.91
~xxl-dino             ~xxl-0939524-0.150          -                           -    FD-DINOv2 42.84
edm2-img64-s-fid      edm2-img64-s-1073741-0.075  -                           -    FID 1.58
edm2-img64-m-fid      edm2-img64-m-2147483-0.060  -                           -    FID 1.43
edm2-img64-l-fid      edm2-img64-l-1073741-0.040  -                           -    FID 1.33
edm2-img64-xl-fid     edm2-img64-xl-0671088-0.040 -                           -    FID 1.33
~xs-guid-fid          ~xs-2147483-0.045           ~xs-uncond-2147483-0.045    1.40 FID 2.91
~xs-guid-dino         ~xs-2147483-0.150           ~xs-uncond-2147483-0.150    1.70 FD-DINOv2 79.94
~s-guid-fid           ~s-2147483-0.025            ~xs-uncond-2147483-0.025    1.40 FID 2.23
~s-guid-dino          ~s-2147483-0.085            ~xs-uncond-2147483-0.085    1.90 FD-DINOv2 52.32
~m-guid-fid           ~m-2147483-0.030            ~xs-uncond-2147483-0.030    1.20 FID 2.01
~m-guid-dino          ~m-2147483-0.015            ~xs-uncond-2147483-0.015    2.00 FD-DINOv2 41.98
~l-guid-fid           ~l-1879048-0.015            ~xs-uncond-2147483-0.015    1.20 FID 1.88
~l-guid-dino          ~l-1879048-0.035            ~xs-uncond-2147483-0.035    1.70 FD-DINOv2 38.20
~xl-guid-fid          ~xl-1342177-0.020           ~xs-uncond-2147483-0.020    1.20 FID 1.85
~xl-guid-dino         ~xl-1342177-0.030           ~xs-uncond-2147483-0.030    1.70 FD-DINOv2 35.67
~xxl-guid-fid         ~xxl-0939524-0.015          ~xs-uncond-2147483-0.015    1.20 FID 1.81
~xxl-guid-dino        ~xxl-0939524-0.015          ~xs-uncond-2147483-0.015    1.70 FD-DINOv2 33.09
~s-autog-fid          ~s-2147483-0.070            ~xs-0134217-0.125           2.10 FID 1.34
~s-autog-dino         ~s-2147483-0.120            ~xs-0134217-0.165           2.45 FD-DINOv2 36.67
~xxl-autog-fid        ~xxl-0939524-0.075          ~m-0268435-0.155            2.05 FID 1.25
~xxl-autog-dino       ~xxl-0939524-0.130          ~m-0268435-0.205            2.30 FD-DINOv2 24.18
~s-uncond-autog-fid   ~s-uncond-2147483-0.070     ~xs-uncond-0134217-0.110    2.85 FID 3.86
~s-uncond-autog-dino  ~s-uncond-2147483-0.090     ~xs-uncond-0134217-0.125    2.90 FD-DINOv2 90.39
edm2-img64-s-autog-fid  edm2-img64-s-1073741-0.045 edm2-img64-xs-0134217-0.110 1.70 FID 1.01
edm2-img64-s-autog-dino edm2-img64-s-1073741-0.105 edm2-img64-xs-0134217-0.175 2.20 FD-DINOv2 31.85
"""),
}
"""Presets by name. The EDM2 ones are those of NVIDIA's generate_images.py. The EDM ones are named
after their files."""
