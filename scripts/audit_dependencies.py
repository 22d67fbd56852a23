"""Fail where what is installed has a known vulnerability, by pip-audit; skipped where its database is out of reach."""

from __future__ import annotations

import json
import subprocess
import sys

UNREACHABLE = ("No module named pip_audit", "Connection", "Max retries", "Timeout", "timed out", "ServiceError")


def verdict(answer: str, errors: str) -> tuple[int, list[str]]:
    """Exit code, and what to print, for what pip-audit has written as JSON and to standard error."""
    try:
        dependencies = json.loads(answer)["dependencies"]
    except ValueError:
        if any(sign in errors for sign in UNREACHABLE):
            return 0, [f"skipped: the database of vulnerabilities is out of reach ({errors.splitlines()[-1][:99]})"]
        return 1, [f"expected an answer of pip-audit, got: {errors}"]
    known = [each for each in dependencies if "vulns" in each]
    if not known:  # an index without the database says of each that it is not there
        return 0, [f"skipped: the database of vulnerabilities knows none of {len(dependencies)} dependencies"]
    wrong = [(each, vulnerability) for each in known for vulnerability in each["vulns"]]
    lines = [f"{each['name']} {each['version']}: {it['id']}, mended in {it['fix_versions']}" for each, it in wrong]
    lines.append(f"{len(wrong)} vulnerabilities in {len(known)} of {len(dependencies)} dependencies")
    return int(bool(wrong)), lines


def main(*arguments: str) -> int:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    code, lines = verdict(done.stdout, done.stderr.strip())
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ("--local", "--skip-editable"))))
