#!/usr/bin/env python3
"""Makes kubernetes.schema.json: the strict schemas of the objects in contrib/kubernetes/, without descriptions.

usage: kubernetes-schema.py DIR > kubernetes.schema.json

DIR is kubernetes_validate/kubernetes-json-schema/vX.Y.Z-local-strict of the package kubernetes-validate
(Apache-2.0, made from the OpenAPI document of Kubernetes): pip download --no-deps kubernetes-validate, and unzip.
"""
import json
import sys

OBJECTS = [
    "io.k8s.api.apps.v1.Deployment",
    "io.k8s.api.autoscaling.v2.HorizontalPodAutoscaler",
    "io.k8s.api.batch.v1.CronJob",
    "io.k8s.api.core.v1.PersistentVolumeClaim",
    "io.k8s.api.core.v1.Service",
]

with open(f"{sys.argv[1]}/_definitions.json") as f:
    definitions = json.load(f)["$defs"]


def strip(node):
    """Without what only people read, and with references inside this document."""
    if isinstance(node, list):
        return [strip(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {}
    for key, value in node.items():
        if key == "description" and isinstance(value, str) or key.startswith("x-kubernetes"):
            continue
        kept[key] = "#/$defs/" + value.rsplit("/", 1)[1] if key == "$ref" else strip(value)
    return kept


def references(node):
    if isinstance(node, list):
        return set().union(*map(references, node)) if node else set()
    if not isinstance(node, dict):
        return set()
    found = {node["$ref"].rsplit("/", 1)[1]} if isinstance(node.get("$ref"), str) else set()
    return found.union(*map(references, node.values())) if node else found


needed, todo = {}, list(OBJECTS)
while todo:
    name = todo.pop()
    if name not in needed:
        needed[name] = strip(definitions[name])
        todo.extend(references(needed[name]))
for name in OBJECTS:
    needed[name]["required"] = sorted(set(needed[name].get("required", [])) | {"apiVersion", "kind", "metadata"})
schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "oneOf": [{"$ref": f"#/$defs/{name}"} for name in OBJECTS],
    "$defs": dict(sorted(needed.items())),
}
json.dump(schema, sys.stdout, separators=(",", ":"), sort_keys=True)
print()
