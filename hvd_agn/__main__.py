"""``python -m hvd_agn check`` and ``python -m hvd_agn bench``."""

import argparse
import json
import sys

from . import config
from .errors import AGNError


def main() -> int:
    """Run the command line; 0 if all is well."""
    parser = argparse.ArgumentParser(prog="python -m hvd_agn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="is everything there that training with hvd_agn needs?")
    bench = commands.add_parser("bench", help="measure").add_subparsers(dest="bench", required=True)
    exchange = bench.add_parser("exchange", help="an exchange, against the memory's limit, allreduce, Get_accumulate")
    exchange.add_argument("--transport", choices=config.TRANSPORTS, default="auto", help="as of Center (default auto)")
    exchange.add_argument(
        "--framework", choices=["tensorflow"], help="its variables, one rank, against torch's exchange"
    )
    exchange.add_argument("--variables", type=_counts, default="1,160", help="numbers of them (default 1,160)")
    multihost = bench.add_parser("multihost", help="exchanges between two emulated hosts; needs root and iproute2")
    step = bench.add_parser("step", help="a step between exchanges, against the wrapped optimizer's, in each framework")
    rules = bench.add_parser("rules", help="each rule's exchange, against the memory's limit for it")
    for each, counts in (exchange, "1,2,4"), (rules, "1,4"):
        each.add_argument("--ranks", type=_counts, default=counts, help=f"rank counts (default {counts})")
    for each in (exchange, multihost, rules, step):
        each.add_argument("--params", type=int, default=25_000_000, help="float32 parameters (default 25000000)")
        each.add_argument("--json", action="store_true", help="one JSON object per row on stdout, the table on stderr")
    arguments = parser.parse_args()

    if getattr(arguments, "framework", None) and (arguments.ranks != [1, 2, 4] or arguments.transport != "auto"):
        exchange.error("--framework measures one rank: leave --ranks and --transport out")
    if arguments.command == "check":
        from .tools import check

        return check.main()
    from .tools import bench as benchmarks
    from .tools import bench_frameworks, bench_hosts

    try:
        if arguments.bench == "exchange" and arguments.framework:
            rows = bench_frameworks.exchanges(arguments.params, arguments.variables)
            columns = bench_frameworks.EXCHANGE_COLUMNS
        elif arguments.bench == "exchange":
            rows = benchmarks.exchange(arguments.params, arguments.ranks, arguments.transport)
            columns = benchmarks.EXCHANGE_COLUMNS
        elif arguments.bench == "multihost":
            columns, rows = bench_hosts.COLUMNS, bench_hosts.run(arguments.params)
        elif arguments.bench == "rules":
            columns, rows = benchmarks.RULES_COLUMNS, benchmarks.all_rules(arguments.params, arguments.ranks)
        else:
            columns, rows = bench_frameworks.STEP_COLUMNS, bench_frameworks.step(arguments.params)
    except AGNError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(benchmarks.table(rows, columns), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
    return 0


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("give numbers of 1 or more")
    return counts


if __name__ == "__main__":
    sys.exit(main())
