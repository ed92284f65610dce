import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from annotation_rows import make_processor

sys.path.insert(0, str(Path(__file__).parents[1]))

from video_files import write_video  # noqa: E402


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """Folder with clips/{0,1,2}.mp4 of 4 s and red.png; read only."""
    root = tmp_path_factory.mktemp("media")
    (root / "clips").mkdir()
    for number in range(3):
        write_video(root / "clips" / f"{number}.mp4", num_frames=40 + number, fps=10)
    PIL.Image.fromarray(np.full((40, 60, 3), (255, 0, 0), np.uint8)).save(root / "red.png")
    return root
