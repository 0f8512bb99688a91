package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	goodDB   = "DATABASE_URL=postgres://u:S3cret@127.0.0.1:1/db"
	goodAMQP = "AMQP_URL=amqp://u:S3cret@127.0.0.1:1/"
)

func TestEveryMistakeIsNamedAndEndsWith2(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty")
	must(t, os.WriteFile(empty, []byte("\n"), 0o600))
	db := func(url string) []string { return []string{"DATABASE_URL=" + url, goodAMQP} }
	broker := func(url string) []string { return []string{goodDB, "AMQP_URL=" + url} }
	with := func(variables ...string) []string { return append(variables, goodDB, goodAMQP) }
	flags := func(args ...string) []string { return args }
	for name, test := range map[string]struct {
		environ []string
		args    []string
		want    string
	}{
		"no database":             {[]string{goodAMQP}, nil, "--database-url ($DATABASE_URL): not set"},
		"no broker":               {[]string{goodDB}, nil, "--amqp-url ($AMQP_URL): not set"},
		"malformed database":      {db("postgres://u:S3cret%zz@127.0.0.1/db"), nil, "--database-url ($DATABASE_URL): malformed"},
		"bad sslmode":             {db("postgres://u:S3cret@127.0.0.1:1/db?sslmode=S3"), nil, "--database-url ($DATABASE_URL): sslmode is invalid"},
		"plaintext database":      {db("postgres://u:S3cret@db.example/db"), nil, `plaintext to "db.example"`},
		"plaintext second host":   {db("postgres://u:S3cret@127.0.0.1:1,db.example:2/db"), nil, `plaintext to "db.example"`},
		"sslmode in the password": {db("postgres://u:sslmode=S3cret@db.example/db"), nil, `plaintext to "db.example"`},
		"plaintext by PGHOST":     {[]string{goodAMQP, "PGHOST=db.example"}, nil, `plaintext to "db.example"`},
		"port by PGPORT":          {[]string{goodAMQP, "PGPORT=x", "PGPASSWORD=S3cret"}, nil, "--database-url ($DATABASE_URL): "},
		"plaintext broker":        {broker("amqp://u:S3cret@mq.example"), nil, `plaintext to "mq.example"`},
		"comma in one broker":     {broker("amqp://u:S3cret@127.0.0.1:1,127.0.0.1:2"), nil, "--amqp-url ($AMQP_URL): AMQP URL 2"},
		"unknown variable":        {with("TXBOX_LEESE=1s"), nil, "$TXBOX_LEESE: there is no such setting"},
		"unknown empty variable":  {with("TXBOX_LEESE="), nil, "$TXBOX_LEESE: there is no such setting"},
		"unknown flag":            {with(), flags("--leese=1s"), "--leese: there is no such flag"},
		"unknown flag, two words": {with(), flags("--leese", "1s"), "--leese: there is no such flag"},
		"flag of another command": {with(), flags("--yes"), "--yes: there is no such flag"},
		"unknown short flag":      {with(), flags("-x"), "-x: there is no such flag"},
		"value beside unknowns":   {with(), flags("-x", "now", "--leese=1s", "--lease=soon"), `--lease ($TXBOX_LEASE): "soon" is no duration`},
		"an argument":             {with(), flags("now"), "unexpected argument now"},
		"flag without a value":    {with(), flags("--lease"), "--lease"},
		"no duration":             {with(), flags("--lease=soon"), `--lease ($TXBOX_LEASE): "soon" is no duration`},
		"duration by variable":    {with("TXBOX_RETRY_FOR=7d"), nil, `--retry-for ($TXBOX_RETRY_FOR): "7d"`},
		"empty duration":          {with(), flags("--lease="), `--lease ($TXBOX_LEASE): "" is no duration`},
		"zero":                    {with(), flags("--idle-interval=0s"), "--idle-interval ($TXBOX_IDLE_INTERVAL): 0s is not between 1ms and 1m0s"},
		"negative":                {with(), flags("--stop-timeout=-1s"), "--stop-timeout ($TXBOX_STOP_TIMEOUT): -1s"},
		"negative write":          {with(), flags("--write-timeout=-1s"), "--write-timeout ($TXBOX_WRITE_TIMEOUT): -1s"},
		"negative confirm":        {with(), flags("--confirm-timeout=-1s"), "--confirm-timeout ($TXBOX_CONFIRM_TIMEOUT): -1s"},
		"lease below confirm":     {with(), flags("--lease=14s"), "--lease ($TXBOX_LEASE): 14s is shorter than --confirm-timeout ($TXBOX_CONFIRM_TIMEOUT), 15s"},
		"schema with a semicolon": {with(), flags("--schema=outbox; drop table x"), "--schema ($TXBOX_SCHEMA): "},
		"schema with a quote":     {with(), flags(`--schema=Ou"tbox`), "--schema ($TXBOX_SCHEMA): "},
		"schema with a dot":       {with(), flags("--schema=a.b"), "--schema ($TXBOX_SCHEMA): "},
		"schema too long":         {with(), flags("--schema=" + strings.Repeat("s", 64)), "--schema ($TXBOX_SCHEMA): "},
		"schema of PostgreSQL":    {with(), flags("--schema=pg_catalog"), "--schema ($TXBOX_SCHEMA): "},
		"schema that is a URL":    {with("TXBOX_SCHEMA=postgres://u:S3cret@h/db"), nil, "--schema ($TXBOX_SCHEMA): "},
		"name too long":           {with(), flags("--name=" + strings.Repeat("é", 128)), "--name ($TXBOX_NAME): "},
		"toggle":                  {with("TXBOX_ALLOW_PLAINTEXT=maybe"), nil, `--allow-plaintext ($TXBOX_ALLOW_PLAINTEXT): "maybe"`},
		"log level":               {with(), flags("--log-level=loud"), "--log-level ($TXBOX_LOG_LEVEL): "},
		"log format":              {with(), flags("--log-format=xml"), "--log-format ($TXBOX_LOG_FORMAT): "},
		"no CA file":              {with(), flags("--amqp-tls-ca=/nowhere"), "--amqp-tls-ca ($TXBOX_AMQP_TLS_CA): "},
		"empty CA file":           {with(), flags("--amqp-tls-ca=" + empty), "holds no certificate"},
		"certificate, no key":     {with(), flags("--amqp-tls-cert=" + empty), "one needs the other"},
		"key, no certificate":     {with(), flags("--amqp-tls-key=" + empty), "--amqp-tls-key ($TXBOX_AMQP_TLS_KEY): one needs the other"},
		"empty certificate":       {with(), flags("--amqp-tls-cert="+empty, "--amqp-tls-key="+empty), "--amqp-tls-cert ($TXBOX_AMQP_TLS_CERT)"},
		"TLS files, no TLS":       {with(), flags("--amqp-tls-ca=" + empty), "does not begin with amqps://"},
		"no such file":            {[]string{"DATABASE_URL_FILE=/nowhere", goodAMQP}, nil, "$DATABASE_URL_FILE: read the file: no such file"},
		"empty file":              {[]string{goodDB, "AMQP_URL_FILE=" + empty}, nil, "$AMQP_URL_FILE: the file is empty"},
		"value and file":          {[]string{goodDB, "DATABASE_URL_FILE=" + empty, goodAMQP}, nil, "both set"},
		"two files' own variable": {[]string{"TXBOX_DATABASE_URL_FILE=/nowhere", goodDB, goodAMQP}, nil, "$TXBOX_DATABASE_URL_FILE"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			text, code := runProgram(t, test.environ, append([]string{"run"}, test.args...)...)
			if code != 2 || !strings.Contains(text, test.want) {
				t.Errorf("exit code %d, want %q in:\n%s", code, test.want, text)
			}
			if strings.Contains(text, "S3cret") {
				t.Errorf("a password is shown:\n%s", text)
			}
		})
	}
}

func TestAllMistakesAreReportedAtOnce(t *testing.T) {
	text, code := runProgram(t, []string{"DATABASE_URL=nonsense S3cret", "AMQP_URL=http://u:S3cret@h,amqp://u:S3cret@mq.example", "TXBOX_LEESE=1", "TXBOX_ALLOW_PLAINTEXT=x"},
		"run", "--lease=1s", "--confirm-timeout=99h", "--retry-for=0s", "--schema=a.b", "--log-level=x", "--leese", "1s", "--log-format=x",
		"--amqp-tls-ca=/nowhere", "--write-timeout=x", "--idle-interval=x", "--stop-timeout=x", "--bogus", "--name="+strings.Repeat("x", 256))
	if code != 2 || strings.Contains(text, "S3cret") {
		t.Errorf("exit code %d:\n%s", code, text)
	}
	if strings.Contains(text, "AllowPlaintext") || strings.Contains(text, "ConfirmTimeout") {
		t.Errorf("names of the library in:\n%s", text)
	}
	for _, want := range []string{"--database-url", "AMQP URL 1", "AMQP URL 2", "$TXBOX_LEESE", "--leese", "--bogus", "--allow-plaintext", "--lease ", "--confirm-timeout", "--retry-for",
		"--schema", "--log-level", "--log-format", "--amqp-tls-ca", "--write-timeout", "--idle-interval", "--stop-timeout", "--name"} {
		if !strings.Contains(text, want) {
			t.Errorf("%s is not in:\n%s", want, text)
		}
	}
}

// What kong alone can tell comes with what it cannot.
func TestMistakesInTheSyntaxDoNotHideOthers(t *testing.T) {
	text, code := runProgram(t, []string{goodDB, goodAMQP, "TXBOX_LEESE=1"}, "run", "now", "--bogus")
	for _, want := range []string{"unexpected argument now", "$TXBOX_LEESE", "--bogus"} {
		if code != 2 || !strings.Contains(text, want) {
			t.Errorf("exit code %d, %s is not in:\n%s", code, want, text)
		}
	}
}

func TestFlagsGoOverVariablesAndTheseOverDefaults(t *testing.T) {
	environ := []string{"TXBOX_DATABASE_URL=postgres://u@127.0.0.1:2/db", "DATABASE_URL=postgres://u@127.0.0.1:3/db"}
	for _, test := range []struct {
		environ []string
		args    []string
		want    string
	}{
		{environ, []string{"--database-url=postgres://u@127.0.0.1:1/db"}, "127.0.0.1:1 "},
		{environ, nil, "127.0.0.1:2 "},
		{environ[1:], nil, "127.0.0.1:3 "},
		{[]string{"PGHOST=127.0.0.1", "PGPORT=4"}, nil, "127.0.0.1:4 "},
		{[]string{"PGHOST=127.0.0.1", "PGPORT=4", "DATABASE_URL=", "DATABASE_URL_FILE=", "TXBOX_SCHEMA=", "TXBOX_STATUS_TIMEOUT="}, nil, "127.0.0.1:4 "},
		{[]string{"PGDATABASE=db", "PGPORT=5"}, nil, "5"},
	} {
		if text, code := runProgram(t, test.environ, append([]string{"status"}, test.args...)...); code != 1 || !strings.Contains(text, test.want) {
			t.Errorf("%q %q: exit code %d, want %q in:\n%s", test.environ, test.args, code, test.want, text)
		}
	}
}

func TestPlaintextIsAllowedToWhoeverSaysSo(t *testing.T) {
	const host = "db.invalid" // resolves nowhere, by RFC 6761
	for name, test := range map[string]struct {
		environ []string
		args    []string
	}{
		"sslmode in the URL":      {environ: []string{"DATABASE_URL=postgres://u@" + host + "/db?sslmode=disable"}},
		"sslmode among keywords":  {environ: []string{"DATABASE_URL=host=" + host + " sslmode=prefer"}},
		"sslmode for a few hosts": {environ: []string{"DATABASE_URL=postgres://u@" + host + ":1," + host + ":2/db?sslmode=disable"}},
		"PGSSLMODE":               {environ: []string{"PGHOST=" + host, "PGSSLMODE=disable"}},
		"the flag":                {environ: []string{"PGHOST=" + host}, args: []string{"--allow-plaintext"}},
		"the variable":            {environ: []string{"PGHOST=" + host, "TXBOX_ALLOW_PLAINTEXT=true"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if text, code := runProgram(t, test.environ, append([]string{"status", "--timeout=5s"}, test.args...)...); code != 1 || strings.Contains(text, "plaintext") {
				t.Errorf("exit code %d:\n%s", code, text)
			}
		})
	}
}

func TestHelpIsNotAFailureAndShowsNoSecret(t *testing.T) {
	for _, args := range [][]string{{}, {"help"}, {"help", "migrate", "up"}, {"--help"}, {"run", "--help"}, {"migrate", "--help"}, {"status", "--help"}} {
		text, code := runProgram(t, []string{goodDB, goodAMQP}, args...)
		if code != 0 || !strings.Contains(text, "Usage: relay") || strings.Contains(text, "S3cret") {
			t.Errorf("relay %s: exit code %d:\n%s", args, code, text)
		}
	}
}

func TestServicesOfKubernetesAreNoSettings(t *testing.T) {
	environ := []string{"TXBOX_SERVICE_HOST=10.0.0.1", "TXBOX_PORT_80_TCP=tcp://10.0.0.1:80", "DATABASE_URL=postgres://127.0.0.1:1/db"}
	if text, _ := runProgram(t, environ, "migrate", "status"); !strings.Contains(text, "no such setting") {
		t.Errorf("outside Kubernetes:\n%s", text)
	}
	if text, _ := runProgram(t, append(environ, "KUBERNETES_SERVICE_HOST=10.0.0.2"), "migrate", "status"); strings.Contains(text, "no such setting") {
		t.Errorf("inside:\n%s", text)
	}
}
