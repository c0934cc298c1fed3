from __future__ import annotations

from pathlib import Path

import pytest

from dsft.config.load import config_to_json, load_config
from dsft.errors import ConfigError
from tests.support.run_yaml import write_run_yaml

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"https://user:{SECRET}@host/a.jsonl", "must not hold a user, a password or a query"),
        (f"s3://{SECRET}@bucket/a.jsonl", "must not hold a user"),
        (f"https://host/a.jsonl?X-Amz-Signature={SECRET}", "must not hold a user"),
        (f"ftp://user:{SECRET}@host/a.jsonl", "there is no scheme ftp://"),
    ],
)
@pytest.mark.parametrize("as_list", [False, True])
def test_a_secret_in_a_url_is_refused_and_not_repeated(path: str, message: str, as_list: bool, tmp_path: Path) -> None:
    file = write_run_yaml(tmp_path)
    text = file.read_text()
    assert "path: [a.jsonl, b.jsonl]" in text
    file.write_text(text.replace("path: [a.jsonl, b.jsonl]", f'path: ["{path}"]' if as_list else f'path: "{path}"'))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file)
    assert "line 10: data.sources.1.path" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_urls_without_secrets_are_paths(tmp_path: Path) -> None:
    file = write_run_yaml(tmp_path)
    urls = ["s3://bucket/a?/*.jsonl", "gs://b/a.jsonl", "hf://datasets/o/n@main/*.parquet", "https://h/a.jsonl"]
    file.write_text(file.read_text().replace("[a.jsonl, b.jsonl]", str(urls)))
    assert config_to_json(load_config(file))["data"]["sources"][1]["path"] == urls
