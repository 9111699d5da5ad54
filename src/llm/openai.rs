//! A client of any OpenAI-compatible server: one blocking POST to `chat/completions` an answer.
//!
//! Failures that may pass (408, 409, 429, 5xx, no connection) are tried again with growing delays, or after the
//! server's `Retry-After`. Servers differ in what `response_format` they know, so a 400 steps down from a JSON
//! Schema to a JSON object to nothing, once for all later requests. Knows no chunk and no example.

use std::io::Read;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use reqwest::blocking::{Client, Response};
use serde_json::{Value, json};

use super::{Answer, Generator, LlmError, Request, Usage};
use crate::corpus::words::excerpt;

/// A longer body is no answer of a chat model.
const BODY_BYTES_MAX: u64 = 16 << 20;
/// Longer waits than this are the user's to decide on.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(120);

/// What a client needs to know.
pub(super) struct Settings {
    pub(super) base_url: String,
    pub(super) model: String,
    pub(super) api_key_env: Option<String>,
    pub(super) requests_per_minute: Option<u32>,
    pub(super) timeout: Duration,
    pub(super) retries: usize,
    /// The first wait before a retry; each later one is twice as long, up to a minute.
    pub(super) first_delay: Duration,
}

/// A connection to one model on one server.
pub(crate) struct OpenAi {
    url: String,
    model: String,
    /// Never shown: there is no `Debug` on this type.
    key: Option<String>,
    client: Client,
    pace: Option<Pace>,
    delays: ExponentialBuilder,
    /// The richest `response_format` the server is known to take.
    format: AtomicU8,
}

/// The kinds of `response_format`, richest first.
const FORMATS: [&str; 3] = ["json_schema", "json_object", "none"];

impl OpenAi {
    pub(super) fn new(settings: Settings) -> Result<Self, LlmError> {
        let key = match settings.api_key_env {
            Some(variable) => match std::env::var(&variable) {
                Ok(key) if !key.trim().is_empty() => Some(key.trim().to_owned()),
                _ => return Err(LlmError::MissingKey { variable }),
            },
            None => None,
        };
        let url = format!("{}/chat/completions", settings.base_url.trim_end_matches('/'));
        // Fails only if a provider is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut client = Client::builder().timeout(settings.timeout).connect_timeout(Duration::from_secs(20));
        if is_loopback(&url) {
            client = client.no_proxy();
        }
        let client =
            client.build().map_err(|error| LlmError::Client { url: url.clone(), reason: reason(&error) })?;
        let delays = ExponentialBuilder::default()
            .with_min_delay(settings.first_delay)
            .with_max_delay(Duration::from_secs(60))
            .with_max_times(settings.retries);
        let pace = settings.requests_per_minute.map(Pace::new);
        Ok(Self { url, model: settings.model, key, client, pace, delays, format: AtomicU8::new(0) })
    }

    /// Sends the request until it is answered, the retries are used up, or waiting will not help.
    fn answer(&self, request: &Request<'_>, stop: &(dyn Fn() -> bool + Sync)) -> Result<Answer, LlmError> {
        let mut delays = self.delays.build();
        loop {
            if let Some(pace) = &self.pace {
                wait(pace.next_slot(), stop)?;
            }
            if stop() {
                return Err(LlmError::Cancelled);
            }
            let format = if request.schema.is_some() { self.format.load(Ordering::Relaxed) } else { 2 };
            let error = match self.send(request, usize::from(format)) {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            if matches!(error, LlmError::Status { status: 400 | 422, .. }) && format < 2 {
                self.format.fetch_max(format + 1, Ordering::Relaxed);
                continue;
            }
            let asked = match &error {
                LlmError::Status { retry_after, .. } => *retry_after,
                _ => None,
            };
            match delays.next() {
                Some(delay) if error.is_transient() && asked.is_none_or(|asked| asked <= RETRY_AFTER_MAX) => {
                    wait(asked.unwrap_or(delay), stop)?;
                }
                _ => return Err(error),
            }
        }
    }

    fn send(&self, request: &Request<'_>, format: usize) -> Result<Answer, LlmError> {
        let mut http = self.client.post(&self.url).json(&self.body(request, FORMATS[format]));
        if let Some(key) = &self.key {
            http = http.bearer_auth(key);
        }
        let unreachable =
            |error: reqwest::Error| LlmError::Unreachable { url: self.url.clone(), reason: reason(&error) };
        let response = http.send().map_err(unreachable)?;
        let status = response.status();
        let retry_after = retry_after(&response);
        let mut body = Vec::new();
        response.take(BODY_BYTES_MAX).read_to_end(&mut body).map_err(|error| LlmError::Unreachable {
            url: self.url.clone(),
            reason: format!("the answer broke off: {error}"),
        })?;
        if !status.is_success() {
            let excerpt = excerpt(&self.without_key(&String::from_utf8_lossy(&body)), 300);
            return Err(LlmError::Status {
                url: self.url.clone(),
                status: status.as_u16(),
                excerpt,
                retry_after,
            });
        }
        let malformed = |reason: String| LlmError::Malformed { url: self.url.clone(), reason };
        let body: Value = serde_json::from_slice(&body).map_err(|error| malformed(error.to_string()))?;
        let choice = body
            .pointer("/choices/0")
            .ok_or_else(|| malformed(excerpt(&self.without_key(&body.to_string()), 200)))?;
        let tokens = |name: &str| body["usage"][name].as_u64().unwrap_or(0);
        Ok(Answer {
            // A refusal has no content: an empty answer, which no schema takes.
            text: choice["message"]["content"].as_str().unwrap_or("").to_owned(),
            is_cut_off: choice["finish_reason"] == "length",
            usage: Usage {
                prompt_tokens: tokens("prompt_tokens"),
                completion_tokens: tokens("completion_tokens"),
            },
        })
    }

    fn body(&self, request: &Request<'_>, format: &str) -> Value {
        let mut messages = Vec::new();
        if let Some(system) = &request.system {
            messages.push(json!({ "role": "system", "content": system }));
        }
        messages.push(json!({ "role": "user", "content": request.user }));
        let mut body = json!({ "model": self.model, "messages": messages });
        if let Some(temperature) = request.temperature {
            body["temperature"] = json!(temperature);
        }
        if let Some(max_tokens) = request.max_tokens {
            body["max_tokens"] = json!(max_tokens);
        }
        match (format, &request.schema) {
            ("json_schema", Some(schema)) => {
                let named = json!({ "name": "answer", "strict": true, "schema": schema });
                body["response_format"] = json!({ "type": "json_schema", "json_schema": named });
            }
            ("json_object", _) => body["response_format"] = json!({ "type": "json_object" }),
            _ => {}
        }
        body
    }

    /// Servers like to quote the key they refuse.
    fn without_key(&self, text: &str) -> String {
        self.key.as_ref().map_or_else(|| text.to_owned(), |key| text.replace(key, "***"))
    }
}

impl Generator for OpenAi {
    fn answers(
        &self,
        request: &Request<'_>,
        stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Answer>, LlmError> {
        self.answer(request, stop).map(|answer| vec![answer])
    }

    fn identity(&self) -> String {
        format!("openai:{}", self.model)
    }

    fn key(&self, _request: &Request<'_>) -> String {
        format!("openai:{} at {}", self.model, self.url)
    }

    fn is_live(&self) -> bool {
        true
    }
}

/// Spreads requests evenly over the minute.
struct Pace {
    interval: Duration,
    next: Mutex<Option<Instant>>,
}

impl Pace {
    fn new(requests_per_minute: u32) -> Self {
        Self { interval: Duration::from_secs(60) / requests_per_minute.max(1), next: Mutex::new(None) }
    }

    /// Takes the next free slot: how long to wait for it.
    fn next_slot(&self) -> Duration {
        let now = Instant::now();
        let mut next = self.next.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let slot = next.map_or(now, |next| next.max(now));
        *next = Some(slot + self.interval);
        slot - now
    }
}

/// Sleeps in short pieces, so that a stop is heard.
fn wait(time: Duration, stop: &(dyn Fn() -> bool + Sync)) -> Result<(), LlmError> {
    let mut left = time;
    while !left.is_zero() {
        if stop() {
            return Err(LlmError::Cancelled);
        }
        let piece = left.min(Duration::from_millis(100));
        std::thread::sleep(piece);
        left -= piece;
    }
    Ok(())
}

/// The `Retry-After` header where it is a number of seconds; its date form is left to the growing delays.
fn retry_after(response: &Response) -> Option<Duration> {
    let seconds: f64 = response.headers().get("retry-after")?.to_str().ok()?.trim().parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

fn is_loopback(url: &str) -> bool {
    let host =
        reqwest::Url::parse(url).ok().and_then(|url| url.host_str().map(str::to_owned)).unwrap_or_default();
    let host = host.trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The innermost cause: the outer ones repeat the URL.
fn reason(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer within the time limit".to_owned();
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;
    use std::sync::Arc;

    use tunesmith_pipeline::stage::StageError;

    use super::*;

    /// A server that answers each request with the next of these raw HTTP responses (the last one for ever) and
    /// keeps what it was sent.
    pub(crate) struct Server {
        pub(crate) base_url: String,
        pub(crate) requests: Arc<Mutex<Vec<String>>>,
    }

    impl Server {
        pub(crate) fn start(responses: Vec<String>) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let base_url = format!("http://{}/v1", listener.local_addr().unwrap());
            let requests = Arc::new(Mutex::new(Vec::new()));
            let seen = requests.clone();
            std::thread::spawn(move || {
                for (index, stream) in listener.incoming().enumerate() {
                    let mut stream = stream.unwrap();
                    let mut reader = BufReader::new(stream.try_clone().unwrap());
                    let (mut head, mut length) = (String::new(), 0);
                    loop {
                        let mut line = String::new();
                        if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
                            break;
                        }
                        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                            length = value.trim().parse().unwrap();
                        }
                        head += &line;
                    }
                    let mut body = vec![0; length];
                    reader.read_exact(&mut body).unwrap();
                    seen.lock().unwrap().push(head + &String::from_utf8(body).unwrap());
                    let response = &responses[index.min(responses.len() - 1)];
                    let _ = stream.write_all(response.as_bytes());
                }
            });
            Self { base_url, requests }
        }

        pub(crate) fn sent(&self) -> Vec<String> {
            self.requests.lock().unwrap().clone()
        }
    }

    pub(crate) fn http(status: &str, headers: &str, body: &str) -> String {
        let length = body.len();
        format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n{body}")
    }

    pub(crate) fn completion(content: &str) -> String {
        let body = json!({
            "choices": [{ "message": { "role": "assistant", "content": content }, "finish_reason": "stop" }],
            "usage": { "prompt_tokens": 11, "completion_tokens": 5 },
        });
        http("200 OK", "Content-Type: application/json\r\n", &body.to_string())
    }

    fn client(base_url: &str, api_key_env: Option<&str>) -> Result<OpenAi, LlmError> {
        OpenAi::new(Settings {
            base_url: base_url.to_owned(),
            model: "test-model".to_owned(),
            api_key_env: api_key_env.map(str::to_owned),
            requests_per_minute: None,
            timeout: Duration::from_secs(10),
            retries: 2,
            first_delay: Duration::from_millis(1),
        })
    }

    fn request() -> Request<'static> {
        Request {
            system: Some("Be brief.".to_owned()),
            user: "Hello?".to_owned(),
            schema: Some(json!({ "type": "object" })),
            temperature: Some(0.5),
            max_tokens: Some(64),
            passage: None,
        }
    }

    fn ask(client: &OpenAi) -> Result<Answer, LlmError> {
        client.answer(&request(), &|| false)
    }

    #[test]
    fn an_answer_comes_with_its_cost() {
        let server = Server::start(vec![completion("{}")]);
        let answer = ask(&client(&server.base_url, None).unwrap()).unwrap();
        let usage = Usage { prompt_tokens: 11, completion_tokens: 5 };
        assert_eq!(answer, Answer { text: "{}".to_owned(), is_cut_off: false, usage });
        let sent = &server.sent()[0];
        assert!(sent.starts_with("POST /v1/chat/completions HTTP/1.1"), "{sent}");
        assert!(!sent.to_lowercase().contains("authorization"), "{sent}");
        assert!(sent.contains(r#""temperature":0.5"#) && sent.contains(r#""type":"json_schema""#), "{sent}");
    }

    #[test]
    fn a_rate_limit_is_waited_out() {
        let limited = http("429 Too Many Requests", "Retry-After: 0\r\n", "slow down");
        let server = Server::start(vec![limited.clone(), limited, completion("ok")]);
        assert_eq!(ask(&client(&server.base_url, None).unwrap()).unwrap().text, "ok");
        assert_eq!(server.sent().len(), 3);
    }

    #[test]
    fn retries_end() {
        let server = Server::start(vec![http("503 Service Unavailable", "", "busy")]);
        let error = ask(&client(&server.base_url, None).unwrap()).unwrap_err();
        assert!(matches!(error, LlmError::Status { status: 503, .. }) && error.is_transient());
        assert_eq!(server.sent().len(), 3);
    }

    #[test]
    fn an_hour_of_waiting_is_not_accepted() {
        let server = Server::start(vec![http("429 Too Many Requests", "Retry-After: 3600\r\n", "")]);
        assert!(ask(&client(&server.base_url, None).unwrap()).is_err());
        assert_eq!(server.sent().len(), 1);
    }

    #[test]
    fn a_server_without_json_schema_gets_json_object_from_then_on() {
        let refusal =
            http("400 Bad Request", "", r#"{"error":"response_format json_schema is not supported"}"#);
        let server = Server::start(vec![refusal, completion("a"), completion("b")]);
        let client = client(&server.base_url, None).unwrap();
        assert_eq!(ask(&client).unwrap().text, "a");
        assert_eq!(ask(&client).unwrap().text, "b");
        let kinds: Vec<bool> = server.sent().iter().map(|sent| sent.contains("json_object")).collect();
        assert_eq!(kinds, [false, true, true]);
    }

    #[test]
    fn a_bad_request_of_any_format_is_final() {
        let server = Server::start(vec![http("400 Bad Request", "", "no such model")]);
        let error = ask(&client(&server.base_url, None).unwrap()).unwrap_err();
        assert!(error.to_string().ends_with("answered with status 400: no such model"), "{error}");
        assert!(!error.is_transient());
        assert_eq!(server.sent().len(), 3, "one for each format");
    }

    #[test]
    fn a_web_page_is_no_completion() {
        let server = Server::start(vec![http("200 OK", "", "<html>hello</html>")]);
        let error = ask(&client(&server.base_url, None).unwrap()).unwrap_err();
        assert!(matches!(error, LlmError::Malformed { .. }), "{error}");
    }

    #[test]
    fn a_refused_connection_names_the_url_and_the_next_step() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let base_url = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let error = StageError::from(ask(&client(&base_url, None).unwrap()).unwrap_err());
        assert!(error.message.starts_with(&format!("`{base_url}/chat/completions` cannot be reached")));
        assert!(error.transient && error.hint.unwrap().contains("base_url"));
    }

    #[test]
    fn an_absent_key_is_an_error_before_any_request() {
        let error = client("http://127.0.0.1:9", Some("TUNESMITH_TEST_NO_SUCH_VARIABLE")).err().unwrap();
        assert!(error.to_string().contains("`TUNESMITH_TEST_NO_SUCH_VARIABLE`"));
    }

    #[test]
    fn the_key_is_sent_and_never_told() {
        // `PATH` is a variable every test process has: its value plays the secret.
        let secret = std::env::var("PATH").unwrap().trim().to_owned();
        let echo = http("401 Unauthorized", "", &format!("bad key {secret}"));
        let server = Server::start(vec![echo]);
        let client = client(&server.base_url, Some("PATH")).unwrap();
        let error = ask(&client).unwrap_err();
        assert!(server.sent()[0].contains(&format!("Bearer {secret}")));
        assert!(error.to_string().ends_with("bad key ***"), "{error}");
        assert!(!client.key(&request()).contains(&secret) && !client.identity().contains(&secret));
    }

    #[test]
    fn a_stop_ends_the_wait() {
        let server = Server::start(vec![http("429 Too Many Requests", "Retry-After: 60\r\n", "")]);
        let client = client(&server.base_url, None).unwrap();
        let seen = server.requests.clone();
        let error = client.answer(&request(), &move || !seen.lock().unwrap().is_empty()).unwrap_err();
        assert!(matches!(error, LlmError::Cancelled));
    }

    #[test]
    fn requests_are_spread_over_the_minute() {
        let pace = Pace::new(60);
        assert!(pace.next_slot().is_zero());
        let second = pace.next_slot();
        assert!(second > Duration::from_millis(900) && second <= Duration::from_secs(1), "{second:?}");
        assert!(pace.next_slot() > Duration::from_millis(1900));
    }
}
