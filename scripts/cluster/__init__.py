"""A real Kubernetes cluster for the end-to-end tests: `python -m scripts.cluster up`.

Where Docker runs it is a kind cluster (`kind`). Elsewhere it is built from Go modules and run on this
machine (`local`): etcd, kube-apiserver, kube-controller-manager, kube-scheduler, CoreDNS, Prometheus and
Alertmanager as plain processes, and one real node of kubelet, kube-proxy, containerd and runc.

All of that lives in one network namespace, joined to the machine by a veth pair (addresses in `layout`):

- From the machine, the API server, pod addresses, Service addresses, Prometheus and Alertmanager are all
  reachable by plain URLs, so tests need no port-forward. Cluster DNS names resolve inside only, in pods and
  for Prometheus and Alertmanager.
- From inside, the machine is reachable at `layout.HOST_IP` and nothing else is: there is no default route, so
  no pod's packet can leave the machine.
- A command behind `exec_prefix` of the state file is inside the network, with the machine's files.

The cluster's processes share one private mount namespace too; when the last of them ends, every mount,
interface, route and packet filter rule of the cluster is gone with it. What remains for `down` are cgroups, a
few sysctls that the kubelet sets, and files below the user's cache directory.

`up` writes `.cluster/cluster.json` (see `state`); the end-to-end tests read nothing else.
"""
