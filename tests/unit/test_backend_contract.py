"""The embedded backends pass what every backend must."""

from __future__ import annotations

import pytest

from retrieval.backend import BackendConfig, build_backend
from tests.support.backend_contract import BackendContract, Build


class TestEmbedded(BackendContract):
    @pytest.fixture(params=["faiss", "bm25", "hybrid"])
    def build(self, request: pytest.FixtureRequest) -> Build:
        return lambda documents: build_backend(BackendConfig(kind=request.param), documents)
