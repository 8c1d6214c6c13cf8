//! What Amazon documents of logging in to its registries: the APIs of ECR and STS as functions for [`Hosts`](crate::Hosts),
//! which check what they are sent, signatures too.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::Response;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::hosts::{Answer, Asked, response};
use crate::images::hex;
use crate::oidc::Issuer;

/// An account with one registry in one region.
pub struct Amazon {
    pub region: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Secret and session token of each access key.
    keys: HashMap<String, (String, Option<String>)>,
    /// The subject that may take on each role.
    roles: HashMap<String, String>,
    issuer: Option<Issuer>,
    password: String,
    given: usize,
    repositories: BTreeSet<String>,
    created: Vec<Value>,
    sessions: Vec<String>,
    denied: Option<String>,
    life: Option<u64>,
    busy: Vec<Answer>,
    pod_token: Option<String>,
    instance_role: Option<String>,
}

impl State {
    /// Temporary credentials of the session that was begun last: an access key, its secret and a session token.
    fn begin(&mut self, session: &str) -> [String; 3] {
        self.sessions.push(session.to_owned());
        let number = self.sessions.len();
        let given = [format!("ASIA{number:016}"), format!("secret-{number}"), format!("session-{number}")];
        self.keys.insert(given[0].clone(), (given[1].clone(), Some(given[2].clone())));
        given
    }
}

const END: &str = "2099-01-01T00:00:00Z";

impl Amazon {
    #[must_use]
    pub fn new(region: &str) -> Self {
        Self { region: region.to_owned(), state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add_key(&self, id: &str, secret: &str) {
        self.state().keys.insert(id.to_owned(), (secret.to_owned(), None));
    }

    /// Lets a subject of this issuer's tokens take on a role.
    pub fn trust(&self, role: &str, subject: &str, issuer: Issuer) {
        let mut state = self.state();
        state.roles.insert(role.to_owned(), subject.to_owned());
        state.issuer = Some(issuer);
    }

    /// What is given to those who ask for a password from now on.
    pub fn set_password(&self, password: &str) {
        password.clone_into(&mut self.state().password);
    }

    /// Denies an action of ECR to everybody; none: allows all.
    pub fn deny(&self, action: Option<&str>) {
        self.state().denied = action.map(str::to_owned);
    }

    /// Passwords are good for so many seconds from now on.
    pub fn set_life(&self, seconds: u64) {
        self.state().life = Some(seconds);
    }

    /// Answers so before it does anything else, the last one first.
    pub fn be_busy(&self, answers: Vec<Answer>) {
        self.state().busy = answers;
    }

    /// What EKS has given a Pod to show its agent.
    pub fn set_pod_token(&self, token: &str) {
        self.state().pod_token = Some(token.to_owned());
    }

    /// The role of the machine, which has none before.
    pub fn set_instance_role(&self, role: &str) {
        self.state().instance_role = Some(role.to_owned());
    }

    /// How often a password was given.
    #[must_use]
    pub fn given(&self) -> usize {
        self.state().given
    }

    /// What repositories were created with, in their order.
    #[must_use]
    pub fn created(&self) -> Vec<Value> {
        self.state().created.clone()
    }

    /// The names of the sessions that roles were taken on with.
    #[must_use]
    pub fn sessions(&self) -> Vec<String> {
        self.state().sessions.clone()
    }

    /// What the registry says of a repository that is not there (distribution-spec, `NAME_UNKNOWN`).
    #[must_use]
    pub fn missing(&self, path: &str) -> Option<Answer> {
        let name = path.strip_prefix("/v2/")?;
        let end = ["/manifests/", "/blobs/", "/tags/", "/referrers/"].iter().find_map(|part| name.find(part))?;
        let name = &name[..end];
        if self.state().repositories.contains(name) {
            return None;
        }
        let message = format!("The repository with name '{name}' does not exist in the registry");
        Some((404, json!({"errors": [{"code": "NAME_UNKNOWN", "message": message}]}).to_string()))
    }

    /// The API of ECR, private or public (AWS JSON 1.1).
    pub fn ecr(&self, asked: &Asked) -> Answer {
        let refuse =
            |status, code: &str, message: String| (status, json!({"__type": code, "message": message}).to_string());
        if let Err(error) = self.check_signature(asked) {
            return refuse(400, "InvalidSignatureException", format!("{error:#}"));
        }
        let body: Value = serde_json::from_slice(&asked.body).unwrap_or_default();
        let target = asked.header("x-amz-target").rsplit('.').next().unwrap_or_default().to_owned();
        let mut state = self.state();
        if let Some(answer) = state.busy.pop() {
            return answer;
        }
        if state.denied.as_ref() == Some(&target) {
            let message = format!("User is not authorized to perform: ecr:{target}");
            return refuse(400, "AccessDeniedException", message);
        }
        match target.as_str() {
            "GetAuthorizationToken" => {
                state.given += 1;
                let token = BASE64_STANDARD.encode(format!("AWS:{}", state.password));
                let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
                let end = now + state.life.unwrap_or(43_200);
                let data = json!({"authorizationToken": token, "expiresAt": end, "proxyEndpoint": "https://x"});
                let data = if asked.host.contains("ecr-public") { data } else { json!([data]) };
                (200, json!({ "authorizationData": data }).to_string())
            }
            "CreateRepository" => {
                let name = body["repositoryName"].as_str().unwrap_or_default().to_owned();
                if !state.repositories.insert(name.clone()) {
                    return refuse(400, "RepositoryAlreadyExistsException", format!("{name} exists"));
                }
                state.created.push(body);
                (200, json!({"repository": {"repositoryName": name}}).to_string())
            }
            other => refuse(400, "UnknownOperationException", other.to_owned()),
        }
    }

    /// The agent of EKS Pod Identity at `169.254.170.23` (docs.aws.amazon.com, "Container credential provider").
    pub fn pod_identity(&self, asked: &Asked) -> Answer {
        let mut state = self.state();
        let is_asked_well = asked.method == "GET" && asked.uri.path() == "/v1/credentials";
        if !is_asked_well || state.pod_token.as_deref() != Some(asked.header("authorization")) {
            return (400, "[400] (ValidationException): the token is not valid".to_owned());
        }
        let [id, secret, session] = state.begin("pod");
        let given = json!({
            "AccessKeyId": id, "SecretAccessKey": secret, "Token": session, "AccountId": "123456789012", "Expiration": END,
        });
        (200, given.to_string())
    }

    /// The metadata of a machine at `169.254.169.254` (docs.aws.amazon.com, "Use the Instance Metadata Service", version 2).
    pub fn instance(&self, asked: &Asked) -> Response<String> {
        const TOKEN: &str = "token-of-the-instance";
        const LIFE: &str = "x-aws-ec2-metadata-token-ttl-seconds";
        if asked.method == "PUT" && asked.uri.path() == "/latest/api/token" {
            let mut answer = response((200, TOKEN.to_owned()));
            return match asked.headers.get(LIFE) {
                Some(life) => {
                    answer.headers_mut().insert(LIFE, life.clone());
                    answer
                }
                None => response((400, String::new())),
            };
        }
        if asked.header("x-aws-ec2-metadata-token") != TOKEN {
            return response((401, String::new()));
        }
        let mut state = self.state();
        let role = state.instance_role.clone();
        let path = asked.uri.path().strip_prefix("/latest/meta-data/iam/security-credentials/");
        response(match (path, role) {
            (Some(""), Some(role)) => (200, role),
            (Some(asked), Some(role)) if asked == role => {
                let [id, secret, session] = state.begin("instance");
                let given = json!({
                    "Code": "Success", "LastUpdated": "2020-01-01T00:00:00Z", "Type": "AWS-HMAC", "AccessKeyId": id,
                    "SecretAccessKey": secret, "Token": session, "Expiration": END,
                });
                (200, given.to_string())
            }
            _ => (404, String::new()),
        })
    }

    /// The API of STS (AWS Query): `AssumeRoleWithWebIdentity`, which is not signed.
    pub fn sts(&self, asked: &Asked) -> Answer {
        match self.assume(asked) {
            Ok(xml) => (200, xml),
            Err(error) => {
                let denied = format!(
                    "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>Not authorized to perform \
                     sts:AssumeRoleWithWebIdentity: {error:#}</Message></Error></ErrorResponse>"
                );
                (403, denied)
            }
        }
    }

    fn assume(&self, asked: &Asked) -> Result<String> {
        let form = asked.form();
        let field = |name: &str| form.get(name).cloned().with_context(|| format!("no {name}"));
        ensure!(field("Action")? == "AssumeRoleWithWebIdentity" && asked.header("authorization").is_empty());
        let mut state = self.state();
        let subject = state.roles.get(&field("RoleArn")?).cloned().context("there is no such role")?;
        let issuer = state.issuer.as_ref().context("no issuer is trusted")?;
        let who = issuer.subject(&field("WebIdentityToken")?, "sts.amazonaws.com")?;
        ensure!(who == subject, "{who} is not {subject}");
        let [id, secret, session] = state.begin(&field("RoleSessionName")?);
        Ok(format!(
            "<AssumeRoleWithWebIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
             <AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{id}</AccessKeyId>\
             <SecretAccessKey>{secret}</SecretAccessKey><SessionToken>{session}</SessionToken>\
             <Expiration>{END}</Expiration></Credentials></AssumeRoleWithWebIdentityResult>\
             </AssumeRoleWithWebIdentityResponse>"
        ))
    }

    /// docs.aws.amazon.com, "Create a signed AWS API request" (version 4).
    fn check_signature(&self, asked: &Asked) -> Result<()> {
        let value = asked.header("authorization").strip_prefix("AWS4-HMAC-SHA256 ").context("it is not signed")?;
        let parts: HashMap<&str, &str> = value.split(", ").filter_map(|part| part.split_once('=')).collect();
        let part = |name: &str| parts.get(name).copied().with_context(|| format!("no {name}"));
        let (id, scope) = part("Credential")?.split_once('/').context("no scope")?;
        let (secret, session) = self.state().keys.get(id).cloned().context("the access key is not known")?;
        if let Some(session) = session {
            ensure!(asked.header("x-amz-security-token") == session, "another session token");
        }
        let [day, region, service, "aws4_request"] = scope.split('/').collect::<Vec<_>>()[..] else {
            anyhow::bail!("the scope {scope} is none")
        };
        ensure!(region == self.region || asked.host.contains("ecr-public"), "signed for {region}");
        let date = asked.header("x-amz-date");
        ensure!(date.starts_with(day), "signed for another day");
        let signed = part("SignedHeaders")?;
        ensure!(signed.split(';').any(|name| name == "host"), "the host is not signed");
        let headers = signed.split(';').fold(String::new(), |mut text, name| {
            let _ = writeln!(text, "{name}:{}", asked.header(name).trim());
            text
        });
        let body = hex(&Sha256::digest(&asked.body));
        let query = asked.uri.query().unwrap_or_default();
        let canonical = format!("{}\n{}\n{query}\n{headers}\n{signed}\n{body}", asked.method, asked.uri.path());
        let text = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{}", hex(&Sha256::digest(canonical)));
        let key = [day, region, service, "aws4_request"]
            .iter()
            .fold(format!("AWS4{secret}").into_bytes(), |key, part| hmac(&key, part.as_bytes()));
        ensure!(part("Signature")? == hex(&hmac(&key, text.as_bytes())), "the signature is wrong");
        Ok(())
    }
}

/// RFC 2104, with SHA-256.
fn hmac(key: &[u8], text: &[u8]) -> Vec<u8> {
    let mut block = [0; 64];
    if key.len() > block.len() {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let padded = |byte: u8| block.map(|found| found ^ byte);
    let inner = Sha256::new().chain_update(padded(0x36)).chain_update(text).finalize();
    Sha256::new().chain_update(padded(0x5c)).chain_update(inner).finalize().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4231, test case 2.
    #[test]
    fn a_code_is_as_the_standard_has_it() {
        let code = hex(&hmac(b"Jefe", b"what do ya want for nothing?"));
        assert_eq!(code, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }
}
