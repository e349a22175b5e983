"""Flags and identities of etcd, API server, controller manager, scheduler and DNS.

etcd starts empty each time: the state of an earlier run would contain nodes and pods that no longer exist.
"""

from __future__ import annotations

import base64
import json
import secrets
import ssl
import urllib.request
from pathlib import Path

from scripts.cluster.layout import (
    API_SERVICE_IP,
    API_URL,
    CLUSTER_DOMAIN,
    NODE_IP,
    NODE_NAME,
    SERVICE_CIDR,
    Layout,
)
from scripts.cluster.process import run

# component -> (user, group). The kubelet and kube-proxy have their usual rights; the others have all.
IDENTITIES = {
    "admin": ("admin", "system:masters"),
    "kube-controller-manager": ("system:kube-controller-manager", "system:masters"),
    "kube-scheduler": ("system:kube-scheduler", "system:masters"),
    "kubelet": (f"system:node:{NODE_NAME}", "system:nodes"),
    "kube-proxy": ("system:kube-proxy", ""),
    "monitoring": ("kvpilot-monitoring", "system:masters"),
}
CLIENT_RATE = ("--kube-api-qps=500", "--kube-api-burst=1000")
ETCD_URL = "http://127.0.0.1:2379"


def write_identities(layout: Layout) -> None:
    """Create the service account key and a token per component."""
    layout.pki.mkdir(parents=True, exist_ok=True)
    run(["openssl", "genrsa", "-out", layout.pki / "sa.key", "2048"])
    run(["openssl", "rsa", "-in", layout.pki / "sa.key", "-pubout", "-out", layout.pki / "sa.pub"])
    rows = {name: (secrets.token_hex(16), *identity) for name, identity in IDENTITIES.items()}
    lines = [
        f"{token},{user},{name}" + (f',"{group}"' if group else "")
        for name, (token, user, group) in rows.items()
    ]
    tokens = layout.pki / "tokens.csv"
    tokens.touch(mode=0o600)
    tokens.write_text("\n".join(lines) + "\n")


def write_kubeconfigs(layout: Layout) -> None:
    """Write a kubeconfig per component, with the certificate that the API server creates at its start."""
    layout.kubeconfigs.mkdir(parents=True, exist_ok=True)
    authority = base64.b64encode((layout.pki / "apiserver.crt").read_bytes()).decode()
    for line in (layout.pki / "tokens.csv").read_text().splitlines():
        token, _, name = line.split(",")[:3]
        file = layout.kubeconfigs / name
        file.touch(mode=0o600)
        file.write_text(kubeconfig(name, token, authority))


def kubeconfig(name: str, token: str, authority: str) -> str:
    """A kubeconfig as JSON, a subset of YAML; `authority` is the certificate in base64."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "kvpilot", "cluster": {"server": API_URL, "certificate-authority-data": authority}}
            ],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": "kvpilot", "context": {"cluster": "kvpilot", "user": name}}],
            "current-context": "kvpilot",
        },
        indent=1,
    )


def etcd(layout: Layout) -> list[str]:
    """Arguments of etcd; no fsync, because the data need not survive the cluster."""
    peer = "http://127.0.0.1:2380"
    return [
        *("--data-dir", str(layout.run / "etcd"), "--unsafe-no-fsync", "--log-level=warn"),
        *("--listen-client-urls", ETCD_URL, "--advertise-client-urls", ETCD_URL),
        *(
            "--listen-peer-urls",
            peer,
            "--initial-advertise-peer-urls",
            peer,
            "--initial-cluster",
            f"default={peer}",
        ),
    ]


def kube_apiserver(layout: Layout) -> list[str]:
    """Arguments of the API server."""
    return [
        f"--etcd-servers={ETCD_URL}",
        f"--cert-dir={layout.pki}",
        "--bind-address=0.0.0.0",
        f"--advertise-address={NODE_IP}",
        "--endpoint-reconciler-type=master-count",
        "--authorization-mode=Node,RBAC",
        f"--token-auth-file={layout.pki / 'tokens.csv'}",
        "--allow-privileged=true",
        "--profiling=false",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={layout.pki / 'sa.pub'}",
        f"--service-account-signing-key-file={layout.pki / 'sa.key'}",
        f"--service-cluster-ip-range={SERVICE_CIDR}",
    ]


def kube_controller_manager(layout: Layout) -> list[str]:
    """Arguments of the controller manager, with a client rate limit high enough for scale tests."""
    return [
        f"--kubeconfig={layout.kubeconfigs / 'kube-controller-manager'}",
        "--leader-elect=false",
        f"--root-ca-file={layout.pki / 'apiserver.crt'}",
        f"--service-account-private-key-file={layout.pki / 'sa.key'}",
        f"--flex-volume-plugin-dir={layout.run / 'volume-plugins'}",
        *CLIENT_RATE,
    ]


def kube_scheduler(layout: Layout) -> list[str]:
    """Arguments of the scheduler."""
    return [f"--kubeconfig={layout.kubeconfigs / 'kube-scheduler'}", "--leader-elect=false", *CLIENT_RATE]


def coredns(layout: Layout) -> list[str]:
    """Arguments of CoreDNS, which runs as a process; the kubelet configures its address in pods."""
    file = layout.run / "Corefile"
    file.write_text(corefile(layout.kubeconfigs / "monitoring"))
    return ["-conf", str(file)]


def corefile(kubeconfig_file: Path) -> str:
    """CoreDNS configuration: cluster names without forwarding, and readiness on 127.0.0.1:8181."""
    plugins = [
        f"bind {NODE_IP}",
        "errors",
        "ready 127.0.0.1:8181",
        f"kubernetes {CLUSTER_DOMAIN} in-addr.arpa {{",
        f"  kubeconfig {kubeconfig_file} kvpilot",
        "  ttl 1",
        "}",
    ]
    return ".:53 {\n  " + "\n  ".join(plugins) + "\n}\n"


def api_ready(layout: Layout) -> bool:
    """True if the API server reports readiness."""
    try:
        return answers(f"{API_URL}/readyz", layout.pki / "apiserver.crt")
    except OSError:  # the API server has not written its certificate yet
        return False


def service_ready(layout: Layout) -> bool:
    """True if the API server answers at its Service address, which needs kube-proxy."""
    return answers(f"https://{API_SERVICE_IP}/readyz", layout.pki / "apiserver.crt")


def answers(url: str, authority: Path | None = None) -> bool:
    """True if a URL answers 200 now; ignores the proxies of the environment."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if authority:
        handlers.append(
            urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=str(authority)))
        )
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
