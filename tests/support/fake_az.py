"""A stand-in for the program az: a script that keeps a resource group in a file, and answers as az is documented to.

It makes of a template what its parameters and tags say, knows the commands that recovery machines need, and writes down
every command line that it was called with.
"""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

_SCRIPT = '''#!{python}
import json, re, sys
from pathlib import Path

ROOT = Path({root!r})
STATE = ROOT / "state.json"
NOT_FOUND = 3


def fail(code, message):
    sys.stderr.write("ERROR: " + message + "\\n")
    sys.exit(code)


def options(words):
    found, name = {{}}, None
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            found[name] = None
        elif name is not None:
            found[name] = word if found[name] is None else found[name] + " " + word
        else:
            fail(2, "unrecognized arguments: " + word)
    return found


def value(text, parameters):
    """Work out the few expressions that the templates have."""
    if not isinstance(text, str) or not text.startswith("["):
        return text
    inner = text[1:-1]
    if match := re.fullmatch(r"parameters\\('(\\w+)'\\)", inner):
        return parameters[match[1]]
    if match := re.fullmatch(r"concat\\(parameters\\('(\\w+)'\\), '([^']*)'\\)", inner):
        return parameters[match[1]] + match[2]
    if match := re.fullmatch(r"resourceId\\('Microsoft.Storage/storageAccounts', '(\\w+)'\\)", inner):
        return "/subscriptions/s/resourceGroups/g/providers/Microsoft.Storage/storageAccounts/" + match[1]
    if inner == "resourceGroup().location":
        return "westeurope"
    return text


def deploy(state, wanted):
    template = json.loads(Path(wanted["template-file"]).read_text())
    words = wanted["parameters"].split(" ")
    given = json.loads(Path(words[0][1:]).read_text())["parameters"]
    parameters = {{}}
    for name, told in template["parameters"].items():
        if name in given:
            parameters[name] = given[name]["value"]
        elif "defaultValue" in told:
            parameters[name] = value(told["defaultValue"], parameters)
        else:
            fail(1, "(InvalidTemplate) Deployment template validation failed: 'The value for the template parameter "
                 + repr(name) + " is not provided.'")
        if "allowedValues" in told and parameters[name] not in told["allowedValues"]:
            fail(1, "(InvalidTemplate) The provided value for the template parameter " + repr(name) + " is not valid.")
    if state["refuses"]:
        fail(1, state["refuses"])
    for one in template["resources"]:
        name = value(one["name"], parameters)
        path = "/subscriptions/s/resourceGroups/" + wanted["resource-group"] + "/providers/" + one["type"] + "/" + name
        made = {{"id": path, "name": name, "type": one["type"], "tags": one.get("tags", {{}})}}
        if one["type"] == "Microsoft.Compute/virtualMachines":
            made["power"] = "PowerState/running"
            made["vmId"] = "0a4c5f0d-0000-0000-0000-000000000001"
        state["resources"] = [other for other in state["resources"] if other["id"] != path] + [made]
    if wanted["name"] not in state["deployments"]:
        state["deployments"].append(wanted["name"])
    return {{"name": wanted["name"], "properties": {{"provisioningState": "Succeeded"}}}}


def vm(state, name):
    for one in state["resources"]:
        if one["type"] == "Microsoft.Compute/virtualMachines" and one["name"] == name:
            return one
    fail(NOT_FOUND, "(ResourceNotFound) The Resource 'Microsoft.Compute/virtualMachines/" + name + "' was not found.")


def main(words):
    with (ROOT / "asked").open("a") as log:
        log.write(json.dumps(words) + "\\n")
    cut = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    command, wanted = " ".join(words[:cut]), options(words[cut:])
    state = json.loads(STATE.read_text())
    if wanted.get("output") != "json":
        fail(2, "this stand-in answers in JSON alone")
    group = wanted.get("name") if command == "group show" else wanted.get("resource-group")
    if "ids" not in wanted and group != state["group"]:
        fail(NOT_FOUND, "(ResourceGroupNotFound) Resource group '" + str(group) + "' could not be found.")
    name, answer = wanted.get("name"), None
    if command == "group show":
        answer = {{"name": state["group"], "location": "westeurope"}}
    elif command == "deployment group create":
        answer = deploy(state, wanted)
    elif command == "deployment group show":
        if name not in state["deployments"]:
            fail(NOT_FOUND, "(DeploymentNotFound) Deployment '" + name + "' could not be found.")
        answer = {{"name": name}}
    elif command == "deployment group delete":
        state["deployments"].remove(name)
    elif command == "resource list":
        answer = [{{key: one[key] for key in ("id", "name", "type", "tags")}} for one in state["resources"]]
    elif command == "resource delete":
        state["removed"].append(wanted["ids"])
        if not state["keeps"]:
            state["resources"] = [one for one in state["resources"] if one["id"] != wanted["ids"]]
    elif command == "vm get-instance-view":
        found = vm(state, name)
        statuses = [{{"code": "ProvisioningState/succeeded"}}, {{"code": found["power"]}}]
        answer = {{"id": found["id"], "name": name, "instanceView": {{"statuses": statuses}}}}
    elif command == "vm show":
        found = vm(state, name)
        answer = {{"id": found["id"], "name": name, "vmId": found["vmId"]}}
    elif command in ("vm start", "vm stop", "vm deallocate"):
        codes = {{"start": "running", "stop": "stopped", "deallocate": "deallocated"}}
        vm(state, name)["power"] = "PowerState/" + codes[words[1]]
    else:
        fail(2, "'" + command + "' is misspelled or not recognized by the system.")
    STATE.write_text(json.dumps(state))
    if answer is not None:
        print(json.dumps(answer, indent=2))


main(sys.argv[1:])
'''


class FakeAz:
    """The program in a folder that is to be first in PATH, and what it keeps."""

    def __init__(self, folder: Path, group: str = "recovery") -> None:
        self.folder = folder
        folder.mkdir()
        program = folder / "az"
        program.write_text(_SCRIPT.format(python=sys.executable, root=str(folder)))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        self._state = folder / "state.json"
        self.set(group=group, resources=[], deployments=[], removed=[], refuses="", keeps=False)

    @property
    def state(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self._state.read_text())
        return loaded

    @property
    def asked(self) -> list[list[str]]:
        log = self.folder / "asked"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def set(self, **changes: Any) -> None:
        before = self.state if self._state.exists() else {}
        self._state.write_text(json.dumps({**before, **changes}))
