"""A real Kubernetes cluster for the end-to-end tests: `python -m scripts.cluster up`.

With Docker it is a kind cluster (`kind`). Without Docker it is built from Go modules and runs on this
machine (`local`): etcd, kube-apiserver, kube-controller-manager, kube-scheduler, CoreDNS, Prometheus and
Alertmanager as plain processes, and one real node of kubelet, kube-proxy, containerd and runc.

The local cluster has one network namespace, joined to the machine by a veth pair (addresses in `layout`):

- From the machine, the API server, pod addresses, Service addresses, Prometheus and Alertmanager are all
  reachable by plain URLs, so tests need no port-forward. Cluster DNS names resolve only inside, in pods and
  for Prometheus and Alertmanager.
- From inside, only the machine itself is reachable, at `layout.HOST_IP`: there is no default route, so no
  packet of a pod can leave the machine.
- A command prefixed with `exec_prefix` of the state file runs inside the network, with the machine's files.

The processes also share a private mount namespace. When the last process ends, the kernel removes every
mount, interface, route and packet filter rule of the cluster. `down` removes the rest: cgroups, a few sysctls
that the kubelet sets, and files below the user's cache directory.

`up` writes `.cluster/cluster.json` (see `state`); it is the only interface to the end-to-end tests.
"""
