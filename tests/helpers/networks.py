"""Simulate several hosts on this machine.

Each host is a Linux network namespace with an address and a name, connected to
a bridge. Creating it requires root.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import subprocess

_SUBNET = "10.213.7"


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[list[str]]]:
  """Create hosts, reachable as `address(i)`, and remove them afterwards.

  Yields:
    For each host, a command prefix that runs a command there.

  Raises:
    PermissionError: the user is not root.
  """
  prefix = f"rv{os.getpid() % 10_000}"
  names = [f"{prefix}-{i}" for i in range(count)]
  with contextlib.ExitStack() as stack:
    _ip("link", "add", prefix, "type", "bridge")
    stack.callback(_ip, "link", "del", prefix)
    _ip("link", "set", prefix, "up")
    for i, name in enumerate(names):
      _ip("netns", "add", name)
      stack.callback(_ip, "netns", "del", name)
      inside = ("netns", "exec", name, "ip")
      _ip(
        "link", "add", f"{name}b", "type", "veth", "peer", "eth0", "netns", name
      )
      _ip("link", "set", f"{name}b", "master", prefix, "up")
      _ip(*inside, "addr", "add", f"{address(i)}/24", "dev", "eth0")
      _ip(*inside, "link", "set", "eth0", "up")
      _ip(*inside, "link", "set", "lo", "up")
      # `ip netns exec` mounts it over /etc/hosts, which gloo reads.
      table = pathlib.Path("/etc/netns", name, "hosts")
      for folder in (table.parents[1], table.parent):
        if not folder.exists():
          folder.mkdir()
          stack.callback(folder.rmdir)
      table.write_text(
        "".join(f"{address(j)} {names[j]}\n" for j in range(count))
        + "127.0.0.1 localhost\n"
      )
      stack.callback(table.unlink)
    yield [
      ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c"]
      + [f'hostname {name} && exec "$@"', "sh"]
      for name in names
    ]


def address(host: int) -> str:
  """Return a host's address."""
  return f"{_SUBNET}.{host + 1}"


def _ip(*args):
  try:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)
  except FileNotFoundError as e:
    raise PermissionError("the program ip is missing") from e
  except subprocess.CalledProcessError as e:
    if "not permitted" in e.stderr or "denied" in e.stderr:
      raise PermissionError(f"ip {' '.join(args)}: {e.stderr}") from e
    raise
