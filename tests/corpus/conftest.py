from __future__ import annotations

import pytest

from dsft.corpus.tokenizer import Tokenizer, load_tokenizer
from tests.support.tokenizers import byte_level_folder, legacy_llama_folder, tiny_tokenizer_folder

KINDS = ("sentencepiece", "byte_level", "legacy")


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    tmp = tmp_path_factory.mktemp("tokenizers")
    return {
        "sentencepiece": str(tiny_tokenizer_folder(tmp)),
        "byte_level": str(byte_level_folder(tmp)),
        "legacy": str(legacy_llama_folder(tmp / "l")),
    }


@pytest.fixture(scope="session")
def base_tokenizer(tokenizer_folders: dict[str, str]) -> Tokenizer:
    return load_tokenizer(tokenizer_folders["sentencepiece"])


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer_folders: dict[str, str]) -> Tokenizer:
    return load_tokenizer(tokenizer_folders["sentencepiece"], chat_template="chatml")


@pytest.fixture(scope="session", params=KINDS)
def any_tokenizer(request: pytest.FixtureRequest, tokenizer_folders: dict[str, str]) -> Tokenizer:
    return load_tokenizer(tokenizer_folders[request.param], chat_template="chatml")
