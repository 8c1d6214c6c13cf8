//! What operators ask of Secrets and ServiceAccounts, as the API server's audit log has it. Each place looks at its own
//! operators when it is dropped: no test can forget to.

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde_json::Value;
use testenv::Env;

/// A request that was answered.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) verb: String,
    pub(crate) resource: String,
    pub(crate) namespace: String,
    /// Empty where all were asked for.
    pub(crate) name: String,
    pub(crate) at: Timestamp,
}

/// What the chart's ServiceAccount in a namespace has asked, oldest first.
pub(crate) fn asked(env: &Env, namespace: &str) -> Result<Vec<Asked>> {
    let user = format!("system:serviceaccount:{namespace}:imagemirror");
    let log = std::fs::read_to_string(&env.audit).context("read the audit log")?;
    // A line that is being written has no end yet.
    let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let lines = whole.lines().filter(|line| line.contains(&user));
    let mut asked = Vec::new();
    for line in lines {
        let event: Value = serde_json::from_str(line)?;
        if event["user"]["username"] != user.as_str() {
            continue;
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let object = &event["objectRef"];
        let subresource = text(&object["subresource"]);
        asked.push(Asked {
            verb: text(&event["verb"]),
            resource: format!(
                "{}{}{subresource}",
                text(&object["resource"]),
                if subresource.is_empty() { "" } else { "/" }
            ),
            namespace: text(&object["namespace"]),
            name: text(&object["name"]),
            at: text(&event["requestReceivedTimestamp"]).parse()?,
        });
    }
    asked.sort_by_key(|asked| asked.at);
    Ok(asked)
}

/// When a Secret was read.
pub(crate) fn reads(env: &Env, namespace: &str, secret: &str) -> Result<Vec<Timestamp>> {
    let of_it = |asked: &Asked| asked.resource == "secrets" && asked.name == secret;
    Ok(asked(env, namespace)?.into_iter().filter(of_it).map(|asked| asked.at).collect())
}

/// What was asked that no operator may ask: Secrets and ServiceAccounts are read one by one, by name, where objects are that
/// it serves. Unless it was told to watch Secrets, there, or to make tokens of ServiceAccounts.
pub(crate) fn trespasses(
    env: &Env,
    namespace: &str,
    watched: &[String],
    [watches_secrets, makes_tokens]: [bool; 2],
) -> Vec<String> {
    let all = match asked(env, namespace) {
        Ok(all) => all,
        Err(error) => return vec![format!("{error:#}")],
    };
    let is_fine = |asked: &Asked| {
        let is_known = asked.resource == "secrets" || asked.resource == "serviceaccounts";
        let is_read = asked.verb == "get" && !asked.name.is_empty();
        let is_watch =
            watches_secrets && asked.resource == "secrets" && (asked.verb == "list" || asked.verb == "watch");
        let is_token = makes_tokens && asked.resource == "serviceaccounts/token" && asked.verb == "create";
        ((is_known && (is_read || is_watch)) || is_token) && watched.contains(&asked.namespace)
    };
    all.into_iter().filter(|asked| !is_fine(asked)).map(|asked| format!("{asked:?}")).collect()
}
