"""What several tests of servers share."""

from pathlib import Path

import pytest

from gmsa import GMSA


@pytest.fixture(scope="module")
def folders(gmsa: GMSA, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The two parts of a module's own `gmsa`: folders of the decoder and of the compressor."""
    parts = tmp_path_factory.mktemp("parts")
    gmsa.export_decoder(parts / "decoder")
    gmsa.export_compressor(parts / "compressor")
    return parts / "decoder", parts / "compressor"
