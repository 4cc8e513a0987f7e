"""Tests in a real browser need Chromium and its driver: `make test-browser` installs both, and asks for these tests."""

import os

if os.environ.get("GODWIT_BROWSER") != "1":
    collect_ignore_glob = ["test_*.py"]
