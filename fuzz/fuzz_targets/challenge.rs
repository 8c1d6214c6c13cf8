//! Challenges that are read say no more than the header, and are read to the same when they are written again.

#![no_main]

use imagemirror::auth::Challenge;
use libfuzzer_sys::fuzz_target;

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', r"\\").replace('"', "\\\""))
}

fn render(challenge: &Challenge) -> String {
    match challenge {
        Challenge::Basic => "Basic".to_owned(),
        Challenge::Bearer { realm, service, error } => {
            let pairs = [("realm", Some(realm)), ("service", service.as_ref()), ("error", error.as_ref())];
            let pairs = pairs.into_iter().filter_map(|(name, text)| Some(format!("{name}={}", quoted(text?))));
            format!("Bearer {}", pairs.collect::<Vec<_>>().join(","))
        }
    }
}

fuzz_target!(|header: &str| {
    let challenges = Challenge::parse(header);
    assert!(challenges.len() * "basic".len() <= header.len());
    let written: Vec<String> = challenges.iter().map(render).collect();
    assert_eq!(Challenge::parse(&written.join(", ")), challenges);
});
