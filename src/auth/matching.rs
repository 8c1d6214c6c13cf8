//! Which key of a Docker configuration opens which repository: one row a case, each under the rule that it is from.
//!
//! The rules are the kubelet's (kubernetes.io/docs/concepts/containers/images, "Interpretation of config.json"; its keyring
//! says the rest), those called "ours" where mirrors need another one.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::CredentialStore;

/// A key, a repository, and whether the one opens the other.
type Case = (&'static str, &'static str, bool);

const CASES: &[(&str, &[Case])] = &[
    (
        "a key is a host, with a scheme or without",
        &[
            ("gcr.io", "gcr.io/a/b", true),
            ("https://gcr.io", "gcr.io/a/b", true),
            ("http://gcr.io", "gcr.io/a/b", true),
            ("ftp://gcr.io", "gcr.io/a/b", false),
            ("gcr.io", "eu.gcr.io/a/b", false),
            ("gcr.io", "xgcr.io/a/b", false),
            ("gcr.io", "gcr.io.evil.example/a/b", false),
            ("https://gcr.io.evil.example", "gcr.io/a/b", false),
            ("gcr.io@evil.example", "gcr.io/a/b", false),
            ("gcr.io@evil.example", "evil.example/a/b", false),
            ("localhost", "localhost/a", true),
        ],
    ),
    (
        "a glob stands for one label, and there are as many labels as in the host",
        &[
            ("*.kubernetes.io", "prefix.kubernetes.io/a", true),
            ("*.kubernetes.io", "kubernetes.io/a", false),
            ("*.*.kubernetes.io", "abc.kubernetes.io/a", false),
            ("*.*.kubernetes.io", "abc.def.kubernetes.io/a", true),
            ("*.*.*.kubernetes.io", "a.b.c.kubernetes.io/a", true),
            ("prefix.*.io", "prefix.kubernetes.io/a", true),
            ("prefix.kubernetes.*", "prefix.kubernetes.io/a", true),
            ("*.io", "abc.kubernetes.io/a", false),
            ("*", "kubernetes.io/a", false),
            ("*", "localhost/a", true),
            ("*.*.*.*", "10.1.2.3/a", true),
        ],
    ),
    (
        "a glob is within a label",
        &[
            ("*-good.kubernetes.io", "prefix-good.kubernetes.io/a", true),
            ("*kubernetes.io", "kubernetes.io/a", true),
            ("*kubernetes.io", "a.kubernetes.io/a", false),
            ("k*.io", "quay.io/a", false),
            ("k**.io", "kubernetes.io/a", true),
            ("?cr.io", "gcr.io/a", true),
            ("?gcr.io", "gcr.io/a", false),
            ("123.dkr.ecr.*.amazonaws.com", "123.dkr.ecr.eu-west-1.amazonaws.com/a", true),
            ("g[a-d]r.io", "gcr.io/a", true),
            ("g[^a-d]r.io", "gcr.io/a", false),
            ("g[^x]r.io", "gcr.io/a", true),
            // Only ^ is a no: a ! is a character, which no host has.
            ("g[!x]r.io", "gcr.io/a", false),
        ],
    ),
    (
        "ports are equal, and no globs",
        &[
            ("gcr.io:5000", "gcr.io:5000/a", true),
            ("gcr.io:5000", "gcr.io:5001/a", false),
            ("gcr.io", "gcr.io:5000/a", false),
            ("gcr.io:443", "gcr.io/a", false),
            ("gcr.io", "gcr.io:443/a", false),
            ("gcr.io:*", "gcr.io:5000/a", false),
            ("gcr.io:500?", "gcr.io:5000/a", false),
            ("*.kubernetes.io:1111/blah", "prefix.kubernetes.io:1111/blah", true),
            ("*.kubernetes.io:1234/blah", "prefix.kubernetes.io:1111/blah", false),
            ("prefix.*.io/foo", "prefix.kubernetes.io:1111/foo/bar", false),
            ("127.0.0.1:5000", "127.0.0.1:5000/a", true),
            ("localhost:5000/a", "localhost:5000/a", true),
        ],
    ),
    (
        "a path is the beginning of the repository, and no glob",
        &[
            ("gcr.io/a", "gcr.io/a/b", true),
            ("gcr.io/a/b", "gcr.io/a/b", true),
            ("gcr.io/a/b/c", "gcr.io/a/b", false),
            ("gcr.io/b", "gcr.io/a/b", false),
            ("gcr.io/*", "gcr.io/a/b", false),
            ("gcr.io/?", "gcr.io/a/b", false),
            ("*.my-registry.example/images", "sub.my-registry.example/images/my-image", true),
            ("*.my-registry.example/images", "a.sub.my-registry.example/images/my-image", false),
            ("gcr.io//a", "gcr.io/a/b", false),
        ],
    ),
    (
        "ours: a path ends where a part of the repository does",
        &[
            ("gcr.io/tea", "gcr.io/team/b", false),
            ("gcr.io/team", "gcr.io/team-b", false),
            ("gcr.io/team/a", "gcr.io/team/ab", false),
            ("gcr.io/team", "gcr.io/team", true),
            ("gcr.io/team/", "gcr.io/team", true),
            ("gcr.io/team/", "gcr.io/team/b", true),
            ("gcr.io/team//", "gcr.io/team/b", true),
        ],
    ),
    (
        "/v1/ and /v2/ in front of a path are no part of it",
        &[
            ("https://gcr.io/v1/", "gcr.io/a/b", true),
            ("https://gcr.io/v2/", "gcr.io/a/b", true),
            ("gcr.io/v2/a", "gcr.io/a/b", true),
            ("gcr.io/v2/b", "gcr.io/a/b", false),
            ("gcr.io/v2", "gcr.io/a/b", false),
            ("gcr.io/v2", "gcr.io/v2/b", true),
            ("gcr.io/v3/", "gcr.io/a/b", false),
            ("gcr.io/v1/v2/a", "gcr.io/v2/a", true),
        ],
    ),
    (
        "Docker Hub has one name of many",
        &[
            ("https://index.docker.io/v1/", "docker.io/library/nginx", true),
            ("index.docker.io", "docker.io/library/nginx", true),
            ("docker.io", "docker.io/grafana/grafana", true),
            ("docker.io/grafana", "docker.io/grafana/grafana", true),
            ("docker.io/grafana", "docker.io/library/nginx", false),
            ("https://index.docker.io/v1/", "index.docker.io/library/nginx", true),
            ("https://index.docker.io/v1/", "gcr.io/library/nginx", false),
            ("*.docker.io", "docker.io/library/nginx", false),
            ("hub.docker.com", "docker.io/library/nginx", false),
            // Ours: the kubelet knows these two under fewer names.
            ("registry-1.docker.io", "docker.io/grafana/grafana", true),
            ("https://index.docker.io/v1/grafana", "docker.io/grafana/grafana", true),
            ("https://index.docker.io/v1/grafana", "docker.io/library/nginx", false),
            ("docker.io:443", "docker.io/library/nginx", true),
        ],
    ),
    (
        "an IPv6 address is in brackets, which are no glob",
        &[
            ("[::1]:5000", "[::1]:5000/a", true),
            ("https://[::1]:5000/v2/", "[::1]:5000/a", true),
            ("[::1]", "[::1]/a", true),
            ("[::1]", "[::1]:5000/a", false),
            ("[::1]:5000", "[::2]:5000/a", false),
            ("[fd00::a]:5000/team", "[fd00::a]:5000/team/b", true),
            ("[FD00::A]:5000", "[fd00::a]:5000/a", true),
            ("[::ffff:127.0.0.1]", "[::ffff:127.0.0.1]/a", true),
            ("[abc]", "a/b", false),
        ],
    ),
    (
        "ours: hosts have no case (RFC 3986, section 3.2.2), and paths do",
        &[
            ("GCR.io", "gcr.io/a", true),
            ("*.Kubernetes.IO", "prefix.kubernetes.io/a", true),
            ("Index.Docker.io/v1/", "docker.io/library/nginx", true),
            ("gcr.io/Team", "gcr.io/team/a", false),
        ],
    ),
];

/// The keys of Secrets, in the order of their list; a repository; which Secrets go first (counted from 0) with which key.
type Order = (&'static str, &'static [&'static [&'static str]], &'static str, &'static [(usize, &'static str)]);

const ORDERS: &[Order] = &[
    ("one matches", &[&["gcr.io", "quay.io"]], "gcr.io/a/b", &[(0, "gcr.io")]),
    ("none matches", &[&["gcr.io"], &["quay.io"]], "docker.io/library/nginx", &[]),
    (
        "the longer path first",
        &[&["gcr.io", "gcr.io/a", "gcr.io/a/b"]],
        "gcr.io/a/b/c",
        &[(0, "gcr.io/a/b"), (0, "gcr.io/a"), (0, "gcr.io")],
    ),
    (
        "the longer path first, wherever it is",
        &[&["gcr.io"], &["gcr.io/a"]],
        "gcr.io/a/b",
        &[(1, "gcr.io/a"), (0, "gcr.io")],
    ),
    ("the host before a glob", &[&["*.gcr.io"], &["eu.gcr.io"]], "eu.gcr.io/a", &[(1, "eu.gcr.io"), (0, "*.gcr.io")]),
    (
        "equal keys in the order of the list",
        &[&["gcr.io"], &["gcr.io/a"], &["gcr.io"], &["gcr.io/a"]],
        "gcr.io/a/b",
        &[(1, "gcr.io/a"), (3, "gcr.io/a"), (0, "gcr.io"), (2, "gcr.io")],
    ),
    (
        "what is no part of a key makes it no longer",
        &[&["gcr.io"], &["https://gcr.io/v2/"], &["gcr.io/"]],
        "gcr.io/a",
        &[(0, "gcr.io"), (1, "https://gcr.io/v2/"), (2, "gcr.io/")],
    ),
    (
        "the names of Docker Hub are equal",
        &[&["docker.io"], &["https://index.docker.io/v1/"], &["docker.io/grafana"]],
        "docker.io/grafana/grafana",
        &[(2, "docker.io/grafana"), (0, "docker.io"), (1, "https://index.docker.io/v1/")],
    ),
];

/// Names of whom a repository is opened for, in the order in which they are tried.
fn tried(secrets: &[&[&str]], image: &str) -> Vec<String> {
    let mut store = CredentialStore::default();
    for (number, keys) in secrets.iter().enumerate() {
        let auths: Map<String, Value> = keys
            .iter()
            .map(|key| ((*key).to_owned(), json!({"username": format!("{number} {key}"), "password": "p"})))
            .collect();
        let config = json!({"auths": auths}).to_string();
        store.append(CredentialStore::from_docker_config_json(config.as_bytes(), "x").unwrap());
    }
    let (host, repository) = image.split_once('/').unwrap();
    let found = store.matching(&host.parse().unwrap(), &repository.parse().unwrap());
    found.iter().map(|credential| credential.username().to_owned()).collect()
}

#[test]
fn keys_open_what_the_rules_say() {
    let mut wrong = BTreeMap::new();
    for (rule, cases) in CASES {
        for (key, image, expected) in *cases {
            if tried(&[&[key]], image).is_empty() == *expected {
                wrong.insert((key, image), format!("{rule}: {expected}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(CASES.iter().map(|(_, cases)| cases.len()).sum::<usize>() >= 60);
}

#[test]
fn the_longest_key_goes_first_then_the_order_of_the_list() {
    for (rule, secrets, image, expected) in ORDERS {
        let expected: Vec<String> = expected.iter().map(|(number, key)| format!("{number} {key}")).collect();
        assert_eq!(tried(secrets, image), expected, "{rule}");
    }
}
