"""Commands as an operator types them, run in this process."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli import main
from cli.output import Output


@dataclass(slots=True)
class Done:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


def run(*arguments: str | Path) -> Done:
    output = Output(stdout=io.StringIO(), stderr=io.StringIO())
    code = main.run([str(argument) for argument in arguments], output)
    assert isinstance(output.stdout, io.StringIO)
    assert isinstance(output.stderr, io.StringIO)
    done = Done(code, output.stdout.getvalue(), output.stderr.getvalue())
    assert "Traceback" not in done.err
    assert "unexpected" not in done.err, done.err
    return done


def good(*arguments: str | Path) -> Done:
    done = run(*arguments)
    assert done.code == 0, done.out + done.err
    return done
