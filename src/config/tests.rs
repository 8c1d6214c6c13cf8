//! What is accepted, what is refused, and with which words.

use super::*;
use crate::schedule::RetryTiming;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("operator.yaml")).map_err(|error| error.to_string())
}

fn refused(text: &str) -> String {
    parse(text).expect_err(text)
}

#[test]
fn the_example_has_every_default() {
    let text = include_str!("../../config/operator.yaml");
    let config = parse(text).unwrap();
    assert_eq!((&config.timing, config.limits, &config.log), (&Timing::default(), Limits::default(), &Log::default()));
    let schema = include_str!("../../charts/imagemirror/values.schema.json");
    let schema: serde_json::Value = serde_json::from_str(schema).unwrap();
    let in_chart = &schema["properties"]["config"]["properties"]["timing"]["properties"];
    for key in Timing::KEYS {
        assert!(text.contains(&format!("\n  {key}: ")), "{key} is not in config/operator.yaml");
        assert!(in_chart[key].is_object(), "{key} is not in the chart's values.schema.json");
    }
    assert_eq!(in_chart.as_object().unwrap().len(), Timing::KEYS.len());
    let example = &config.registries[&"registry.example.com".parse().unwrap()];
    assert_eq!((example.options.requests, example.options.streams), (32, 6));
    assert_eq!(example.options.auth_hosts, ["auth.example.com".parse().unwrap()]);
    assert!(config.transport_for(&"registry.internal:5000".parse().unwrap()).plain_http);
    assert!(!config.transport_for(&"elsewhere.example.com".parse().unwrap()).plain_http);
    assert_eq!(config.timing.retry(), RetryTiming::default());
}

#[test]
fn no_text_is_the_default() {
    for text in ["", "# nothing\n", "{}", "null"] {
        assert_eq!(parse(text).unwrap().timing, Timing::default(), "{text:?}");
    }
    assert!(Config::load(None).unwrap().watches("any"));
}

#[test]
fn an_unknown_or_repeated_key_is_refused_with_its_place() {
    let unknown = refused("limits:\n  rums: 3\n");
    assert!(unknown.starts_with("operator.yaml: ") && unknown.contains("rums") && unknown.contains('2'), "{unknown}");
    assert!(refused("timing: {headTimeuot: 3s}").contains("timing.headTimeuot: unknown; use one of apiTimeout, "));
    assert!(refused("limits: {runs: 1}\nlimits: {runs: 2}").contains("limits"));
    assert!(refused("registries: [{plainHTTP: true}]").contains("host"));
}

#[test]
fn wrong_values_are_refused_with_their_key() {
    for (text, key) in [
        ("limits: {runs: 0}", "limits.runs: 0 is out of range"),
        ("limits: {minBytesPerSecond: 1048577}", "limits.minBytesPerSecond: 1048577 is out of range"),
        ("limits: {memory: 7Mi}", "limits.memory: \"7Mi\" is no such quantity: write 8Mi to 1024Mi"),
        ("limits: {memory: 64M}", "limits.memory: \"64M\" is no such quantity"),
        ("registries: [{host: a.b, limits: {streams: 0}}]", "registries[0].limits.streams: "),
        ("registries: [{host: 'https://a.b'}]", "registries[0].host: invalid registry host"),
        ("registries: [{host: a.b, authHosts: [a.b, 'x/y']}]", "registries[0].authHosts[1]: "),
        ("registries: [{host: a.b, uploadHosts: ['https://x']}]", "registries[0].uploadHosts[0]: "),
        ("registries: [{host: a.b, limits: {perSecond: 0}}]", "registries[0].limits.perSecond: "),
        ("registries: [{host: a.b, uploadStrategy: Post}]", "Post"),
        ("registries: [{host: a.b, quirks: {mount: true}}]", "mount"),
        ("registries: [{host: docker.io}, {host: index.docker.io}]", "registries[1].host: docker.io is there twice"),
        ("registries: [{host: a.b, limits: {requests: 6}}]", "registries[0].limits.requests: 6 is too few"),
        ("registries: [{host: a.b, plainHTTP: true, caFile: x}]", "registries[0].caFile: goes with TLS only"),
        ("watchNamespaces: [a, B]", "watchNamespaces[1]: \"B\" is no name"),
        ("watchNamespaces: [a, a]", "watchNamespaces[1]: \"a\" is there twice"),
        ("registries: [{host: gcr.io, createRepositories: {}}]", "gcr.io is no private registry of Amazon"),
        ("identityNamespaces: [a, '*']", "identityNamespaces[1]: \"*\" is no name"),
        ("gcp: {workloadIdentity: my-cluster}", "gcp.workloadIdentity: write projects/PROJECT/"),
        ("log: {level: inof}", "log.level: invalid log level"),
        ("log: {format: xml}", "xml"),
        ("metrics: {certFile: a}", "metrics.keyFile: is absent"),
        ("metrics: {keyFile: a, authentication: TokenReview}", "metrics.certFile: is absent"),
        ("metrics: {authentication: TokenReview}", "metrics.authentication: needs TLS"),
        ("metrics: {authentication: Basic}", "Basic"),
    ] {
        let message = refused(text);
        assert!(message.starts_with("operator.yaml: ") && message.contains(key), "{message}");
    }
}

#[test]
fn a_duration_is_above_zero_and_has_a_unit() {
    for wrong in ["0s", "-5s", "10", "5s-3s", "1d", "''", "99999999999999999999h", "721h", "soon"] {
        let message = refused(&format!("timing: {{headTimeout: {wrong}}}"));
        assert!(message.contains("timing.headTimeout: invalid duration"), "{message}");
    }
    let text = "{limits: {minBytesPerSecond: 0, memory: 8Mi}, timing: {headTimeout: 1m30s, backoffFirst: 20ms, floorWindow: 5s}}";
    let options = parse(text).unwrap().client_options();
    assert_eq!(options.memory, Some(8 << 20));
    let timing = options.timing;
    // Each duration of the client has a key, with the client's own default.
    let defaults = parse("").unwrap().client_options().timing;
    assert_eq!(format!("{defaults:?}"), format!("{:?}", registry::Timing::default()));
    assert_eq!((timing.head, timing.backoff_first), (Duration::from_secs(90), Duration::from_millis(20)));
    assert_eq!(timing.floor, Floor { per_second: 0, window: Duration::from_secs(5) });
}

#[test]
fn durations_that_do_not_fit_together_are_refused_with_the_rule() {
    for (text, message) in [
        ("leaseRenew: 6s", "leaseRenew: 6s is too long: write at most 5s, which is a third of timing.leaseDuration"),
        (
            "tagWriteMargin: 13s",
            "tagWriteMargin: 13s is too long: write at most 12s, which is timing.leaseDuration less",
        ),
        ("tagWriteTimeout: 8500ms", "tagWriteTimeout: 8.5s is too long: write at most 8s, which is"),
        ("ratePause: 2h", "ratePause: 7200s is too long: write at most 3600s, which is timing.ratePauseMax"),
        ("retryTransientMin: 20m", "retryTransientMin: 1200s is too long: write at most 900s"),
    ] {
        let found = refused(&format!("timing: {{{text}}}"));
        assert!(found.contains(message), "{found}");
    }
    let short = "timing: {leaseDuration: 3s, leaseRenew: 1s, tagWriteMargin: 2s, tagWriteTimeout: 1s}";
    assert_eq!(parse(short).unwrap().timing.tag_write_margin, Duration::from_secs(2));
}

#[test]
fn a_broken_ca_file_is_named_with_its_host() {
    let folder = std::env::temp_dir().join(format!("imagemirror-config-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join("operator.yaml");
    fs::write(&path, "registries: [{host: a.example.com, caFile: ca.crt}]").unwrap();
    let message = || Config::load(Some(&path)).unwrap_err().to_string();
    let missing = message();
    assert!(missing.contains("ca.crt of registry a.example.com cannot be read"), "{missing}");
    fs::write(folder.join("ca.crt"), "garbage").unwrap();
    let broken = message();
    assert!(broken.contains("ca.crt of registry a.example.com holds no valid PEM certificate"), "{broken}");
    fs::write(&path, "caFile: ca.crt").unwrap();
    assert!(message().contains("ca.crt of all registries holds no valid PEM certificate"));
    fs::remove_dir_all(&folder).unwrap();
}
