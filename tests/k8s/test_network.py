"""What the network policies say, an allowance a line; what a network plugin makes of them, none of this shows."""

import pytest
from manifests import Manifest, broken, each_folder, of_kind, pods, rendered

PREFIX = "app.kubernetes.io/"
RAY = {
    "all to kubernetes.io/metadata.name=kube-system k8s-app=kube-dns: UDP 53 TCP 53",
    "component In ['head', 'worker'] from component In ['head', 'worker']: any port",
    "component In ['head', 'worker'] to component In ['head', 'worker']: any port",
    "component=head from component=submitter: TCP 8265",
    "component=head from kubernetes.io/metadata.name=kuberay-system name=kuberay-operator: TCP 8265",
    "component=submitter to component=head: TCP 8265",
    "component=head to 10.0.0.0/8: TCP 443 TCP 6443 TCP 8443",  # the API server, for the autoscaler
    "component=head to 172.16.0.0/12: TCP 443 TCP 6443 TCP 8443",
    "component=head to 192.168.0.0/16: TCP 443 TCP 6443 TCP 8443",
}
BUCKET = {"component=head to 0.0.0.0/0: TCP 443"}
DOWNLOAD = {"component=fetch to anyone: UDP 53 TCP 53", "component=fetch to 0.0.0.0/0: TCP 80 TCP 443"}


def said(selector: Manifest) -> str:
    """A selector in short; that a pod is part of vae-tuner goes without saying."""
    words = [f"{key}={value}" for key, value in selector.get("matchLabels", {}).items()]
    words += [f"{one['key']} {one['operator']} {one['values']}" for one in selector.get("matchExpressions", [])]
    return " ".join(word.removeprefix(PREFIX) for word in words if word != f"{PREFIX}part-of=vae-tuner") or "all"


def allowances(documents: list[Manifest]) -> set[str]:
    """Who may speak to whom at which ports, as the policies say it."""
    found = set()
    for policy in of_kind("NetworkPolicy", documents).values():
        spec = policy["spec"]
        for kind, word in (("Ingress", "from"), ("Egress", "to")):
            for rule in spec.get(kind.lower(), []):
                assert kind in spec["policyTypes"]
                ports = " ".join(f"{port['protocol']} {port['port']}" for port in rule.get("ports", [])) or "any port"
                for peer in rule.get(word, [{}]):
                    selectors = [said(peer[key]) for key in ("namespaceSelector", "podSelector") if key in peer]
                    other = peer["ipBlock"]["cidr"] if "ipBlock" in peer else " ".join(selectors) or "anyone"
                    found.add(f"{said(spec['podSelector'])} {word} {other}: {ports}")
    return found


@each_folder
def test_all_traffic_is_denied_unless_a_policy_allows_it(folder):
    name = "fetch" if folder == "data" else "default-deny"  # the data comes before the overlay that denies the rest
    denied = of_kind("NetworkPolicy", rendered(folder))[name]["spec"]
    assert denied["policyTypes"] == ["Ingress", "Egress"]
    assert folder == "data" or denied["podSelector"] == {}


@each_folder
def test_the_policies_allow_what_ray_and_a_bucket_or_the_download_need_and_nothing_more(folder):
    assert allowances(rendered(folder)) == {"data": DOWNLOAD, "s3": RAY | BUCKET}.get(folder, RAY)


@pytest.mark.parametrize(
    ("path", "value", "more"),
    [
        ("default-deny.spec.ingress", [{}], "all from anyone: any port"),
        ("head.spec.egress.0.to.0.ipBlock.cidr", "0.0.0.0/0", "component=head to 0.0.0.0/0: TCP 443 TCP 6443 TCP 8443"),
        ("submitter.spec.egress.0.ports", None, "component=submitter to component=head: any port"),
    ],
)
def test_an_allowance_too_many_is_found(path, value, more):
    assert allowances(broken("local", f"NetworkPolicy/{path}", value)) - RAY == {more}


@each_folder
def test_the_pods_carry_the_labels_that_the_policies_select_them_by(folder):
    for name, template in pods(rendered(folder)).items():
        component = name.removeprefix("ray-")
        assert template["metadata"]["labels"] == {f"{PREFIX}part-of": "vae-tuner", f"{PREFIX}component": component}
