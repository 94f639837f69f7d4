"""What the command line does where there is no network."""

import os
import socket

import pytest

from sparse_expansion.cli import network
from sparse_expansion.cli.main import main


@pytest.fixture
def asked(monkeypatch):
    """The hosts whose names were looked up, in vain."""
    hosts = []

    def no_such_name(host, port):
        hosts.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    monkeypatch.setattr(network, "getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    return hosts


def is_offline():
    return os.environ.get("HF_HUB_OFFLINE") == "1"


@pytest.mark.parametrize("dataset", ["wikitext2", "hf:o/n", "pydoc:1,c4:1"])
def test_a_hub_that_cannot_be_looked_up_is_asked_nothing(dataset, asked):
    network.spare_retries(dataset)
    assert is_offline() and asked == ["huggingface.co"]


def test_a_mirror_is_what_is_looked_up(asked, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:8080/hub")
    network.spare_retries("hf:o/n")
    assert is_offline() and asked == ["mirror.example"]


@pytest.mark.parametrize("dataset", [None, "pydoc", "stdlib:1,pydoc:1", "./mine.txt"])
def test_who_needs_no_hub_looks_nothing_up(dataset, asked):
    network.spare_retries(dataset)
    assert not is_offline() and asked == []


def test_a_proxy_looks_names_up_itself(asked, monkeypatch):
    monkeypatch.setattr(network, "getproxies", lambda: {"https": "http://proxy:3128"})
    network.spare_retries("wikitext2")
    assert not is_offline() and asked == []


def test_a_hub_that_is_there_is_asked(asked, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [(host, port)])
    network.spare_retries("wikitext2")
    assert not is_offline()


def test_a_command_looks_before_it_loads_anything(asked, capsys):
    assert main(["run", "--model", "./no", "--dataset", "hf:o/n"]) == 2
    assert is_offline() and "./no does not exist" in capsys.readouterr().err
