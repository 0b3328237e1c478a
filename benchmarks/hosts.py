"""Emulates hosts with namespaces on one machine, and a network of a given delay and rate between them.

A host is a network namespace and a UTS namespace: it has its own interfaces and host name, and shares CPUs and memory.
Each host has one TUN device, and a relay process carries packets between them. A packet leaves when the sender's line
is free, which limits the rate, and arrives delay_s later. (netem would do the same, but not every kernel has it.)
Requires Linux, root, /dev/net/tun, and the commands ip, nsenter and unshare.

    with emulated_hosts(2, delay_s=1e-3, rate_bit_per_s=1e8) as hosts:
        outputs = run_ranks(hosts, [4, 4], [sys.executable, "program.py"])
"""

import fcntl
import heapq
import os
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

TUN, TUNSETIFF, IFF_TUN, IFF_NO_PI = "/dev/net/tun", 0x400454CA, 1, 0x1000
MTU_BYTES, QUEUE_PACKETS = 1500, 10_000
PORT = 29_500
RANK_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Host:
    """One emulated host. enter: command prefix that runs a command there. device: its network interface."""

    name: str
    address: str
    device: str
    enter: tuple[str, ...]


def obstacle() -> str | None:
    """Return why hosts cannot be emulated here, or None."""
    missing = [command for command in ("ip", "nsenter", "unshare") if shutil.which(command) is None]
    if missing:
        return f"needs the commands {', '.join(missing)}"
    if os.geteuid() != 0 or not os.path.exists(TUN):
        return f"needs root and {TUN}"
    made = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True)
    return made.stderr.strip() or None if made.returncode else None


@contextmanager
def emulated_hosts(count: int, *, delay_s: float, rate_bit_per_s: float) -> Iterator[list[Host]]:
    """Start `count` hosts in one network. They and the relay end when this process ends, even if it is killed."""
    with ExitStack() as stack:
        hosts, tuns = [], []
        for i in range(count):
            space = subprocess.Popen(
                ["unshare", "--net", "--uts", "sh", "-c", f"hostname host{i} && echo && exec cat"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            stack.callback(_end, space)
            assert space.stdout is not None
            space.stdout.readline()  # the namespaces exist; they end when `cat` reads the end of our pipe
            tun, device = _tun()
            stack.callback(os.close, tun)
            enter = ("nsenter", "-t", str(space.pid), "--net", "--uts")
            address = f"10.99.0.{i + 1}"
            _run("ip", "link", "set", device, "netns", str(space.pid))
            _run(*enter, "ip", "address", "add", f"{address}/24", "dev", device)
            _run(*enter, "ip", "link", "set", device, "mtu", str(MTU_BYTES), "txqueuelen", str(QUEUE_PACKETS), "up")
            _run(*enter, "ip", "link", "set", "lo", "up")
            tuns.append(tun)
            hosts.append(Host(f"host{i}", address, device, enter))
        relay = subprocess.Popen(
            [sys.executable, __file__, str(delay_s), str(rate_bit_per_s), *map(str, tuns)],
            stdin=subprocess.PIPE, pass_fds=tuns,
        )  # fmt: skip
        stack.callback(_end, relay)
        yield hosts


def run_ranks(
    hosts: Sequence[Host],
    ranks_per_host: Sequence[int],
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    timeout_s: float = RANK_TIMEOUT_S,
) -> list[str]:
    """Run the command on each rank with torchrun's variables. Returns each rank's stdout; raises if one fails."""
    ranks: list[subprocess.Popen[str]] = []
    size, deadline = sum(ranks_per_host), time.monotonic() + timeout_s
    try:
        for host, count in zip(hosts, ranks_per_host, strict=True):
            for local in range(count):
                variables = {
                    "RANK": len(ranks), "WORLD_SIZE": size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": count,
                    "MASTER_ADDR": hosts[0].address, "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": host.device,
                }  # fmt: skip
                variables = {name: str(value) for name, value in variables.items()}
                ranks.append(
                    subprocess.Popen(
                        [*host.enter, *command], stdout=subprocess.PIPE, text=True,
                        env={**os.environ, **(env or {}), **variables},
                    )
                )  # fmt: skip
        outputs = [rank.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    codes = [rank.returncode for rank in ranks]
    if any(codes):
        raise RuntimeError(f"ranks ended with codes {codes}")
    return outputs


def sent_bytes(device: str) -> int:
    """Return the bytes that left this process's host through that device, including packet headers."""
    with open("/proc/self/net/dev") as file:
        [line] = [line for line in file if line.strip().startswith(f"{device}:")]
    return int(line.split(":")[1].split()[8])


def carry(tuns: Sequence[int], delay_s: float, rate_bit_per_s: float) -> None:
    """The relay: carry packets from each TUN to the TUN of their destination until stdin ends."""
    free_s = [0.0] * len(tuns)  # when the line of each sender is free again
    flying: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        wait_s = max(flying[0][0] - time.monotonic(), 0.0) if flying else None
        ready, _, _ = select.select([*tuns, sys.stdin], [], [], wait_s)
        if sys.stdin in ready:
            return
        for source in ready:
            for packet in _packets(source):
                target = packet[19] - 1 if packet[0] >> 4 == 4 else -1  # an IPv4 address's last byte
                if not 0 <= target < len(tuns):
                    continue
                line, number = tuns.index(source), number + 1
                free_s[line] = max(free_s[line], time.monotonic()) + 8 * len(packet) / rate_bit_per_s
                heapq.heappush(flying, (free_s[line] + delay_s, number, target, packet))
        while flying and flying[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(flying)
            os.write(tuns[target], packet)


def _packets(tun: int) -> Iterator[bytes]:
    while True:
        try:
            yield os.read(tun, 65536)
        except BlockingIOError:
            return


def _tun() -> tuple[int, str]:
    """Create a TUN device. Returns its descriptor and name."""
    descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    made = fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", b"far%d", IFF_TUN | IFF_NO_PI))
    return descriptor, made[:16].rstrip(b"\0").decode()


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _end(process: subprocess.Popen) -> None:
    if process.stdin is not None:
        process.stdin.close()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


if __name__ == "__main__":
    carry([int(word) for word in sys.argv[3:]], float(sys.argv[1]), float(sys.argv[2]))
