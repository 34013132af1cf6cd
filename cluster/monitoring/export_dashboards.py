"""Write Grafana dashboards: Ray's own, as the installed Ray generates them, and vlrank's.

    python cluster/monitoring/export_dashboards.py FOLDER

Only vlrank's dashboard is kept in this repository; Ray's belong to its version.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def ray_dashboards() -> dict[str, str]:
    """File name -> dashboard JSON, from the installed Ray."""
    from ray.dashboard.modules.metrics import grafana_dashboard_factory as factory

    return {
        "ray_default.json": factory.generate_default_grafana_dashboard()[0],
        "ray_data.json": factory.generate_data_grafana_dashboard()[0],
        "ray_train.json": factory.generate_train_grafana_dashboard()[0],
    }


def main(folder: Path) -> None:
    """Write them all."""
    folder.mkdir(parents=True, exist_ok=True)
    own = Path(__file__).with_name("vlrank_dashboard.json").read_text(encoding="utf-8")
    for name, text in {**ray_dashboards(), "vlrank.json": own}.items():
        json.loads(text)
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dashboards"))
