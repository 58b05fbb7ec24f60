"""What the data sets are called, and on which terms their owners give them; from the data sets' own pages."""

from typing import NamedTuple


class Provenance(NamedTuple):
    """Where a data set comes from.

    Args:
        title: its name, in words.
        terms: its licence, in words.
        licence: the Hub's identifier of the licence; `other` if it has none.
        homepage: address of its owners' page; None if there is none.
    """

    title: str
    terms: str
    licence: str
    homepage: str | None


_THINGS = "https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html"
_SINTEL = "http://sintel.is.tue.mpg.de"

PROVENANCE = {
    "synthetic": Provenance("Synthetic pairs drawn by this project", "BSD-3-Clause", "bsd-3-clause", None),
    "pairs": Provenance("The user's own pairs", "the user's to state", "other", None),
    "flying_chairs": Provenance(
        "FlyingChairs",
        "research only",
        "other",
        "https://lmb.informatik.uni-freiburg.de/resources/datasets/FlyingChairs.en.html",
    ),
    "flying_things_clean": Provenance("FlyingThings3D, clean pass", "research only", "other", _THINGS),
    "flying_things_final": Provenance("FlyingThings3D, final pass", "research only", "other", _THINGS),
    "sintel_clean": Provenance("MPI-Sintel, clean pass", "film CC-BY 3.0", "cc-by-3.0", _SINTEL),
    "sintel_final": Provenance("MPI-Sintel, final pass", "film CC-BY 3.0", "cc-by-3.0", _SINTEL),
    "kitti_2012": Provenance(
        "KITTI-2012",
        "CC BY-NC-SA 3.0",
        "cc-by-nc-sa-3.0",
        "https://www.cvlibs.net/datasets/kitti/eval_stereo_flow.php?benchmark=flow",
    ),
    "kitti_2015": Provenance(
        "KITTI-2015",
        "CC BY-NC-SA 3.0",
        "cc-by-nc-sa-3.0",
        "https://www.cvlibs.net/datasets/kitti/eval_scene_flow.php?benchmark=flow",
    ),
    "hd1k": Provenance("HD1K", "CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0", "http://hci-benchmark.iwr.uni-heidelberg.de"),
    "middlebury": Provenance("Middlebury", "no licence stated", "other", "https://vision.middlebury.edu/flow/data/"),
    "spring": Provenance("Spring", "CC BY 4.0", "cc-by-4.0", "https://spring-benchmark.org"),
    "tartanair": Provenance("TartanAir", "CC BY 4.0", "cc-by-4.0", "https://theairlab.org/tartanair-dataset/"),
}
