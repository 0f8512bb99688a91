package rabbit

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/goleak"

	"github.com/txbox/txbox/internal/testenv"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDialerRefusesWhatIsNoListOfWholeURLs(t *testing.T) {
	for name, urls := range map[string]string{
		"empty":                    "",
		"empty part":               "amqp://127.0.0.1,",
		"no scheme":                "127.0.0.1:5672",
		"foreign scheme":           "http://127.0.0.1",
		"comma inside one":         "amqp://127.0.0.1:5672,127.0.0.1:5673",
		"no host":                  "amqp://",
		"bad port":                 "amqp://127.0.0.1:70000",
		"unescaped in password":    "amqp://u:S3cret?#@127.0.0.1",
		"bad escape in password":   "amqp://u:S3cret%zz@127.0.0.1",
		"space in password":        "amqp://u:S3cret x@127.0.0.1 ",
		"slash in password":        "amqp://u:S3cret/x@127.0.0.1",
		"newline":                  "amqp://u:S3cret\n@127.0.0.1",
		"plaintext to other host":  "amqp://u:S3cret@broker.example",
		"plaintext to other host2": "amqp://u:S3cret@127.0.0.1,amqp://u:S3cret@10.0.0.1",
	} {
		t.Run(name, func(t *testing.T) {
			_, err := NewDialer(urls, Config{})
			if err == nil {
				t.Fatal("accepted")
			}
			if strings.Contains(err.Error(), "S3cret") {
				t.Errorf("the error shows the password: %s", err)
			}
		})
	}
}

func TestDialerNamesEveryProblemAtOnce(t *testing.T) {
	_, err := NewDialer("nonsense,amqp://broker.example", Config{WriteTimeout: -1})
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"AMQP URL 1", "AMQP URL 2", "broker.example", "WriteTimeout"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %s", want, err)
		}
	}
}

func TestDialerAcceptsPlaintextOnlyToLoopbackOrIfAllowed(t *testing.T) {
	for urls, cfg := range map[string]Config{
		"amqp://localhost":                    {},
		"amqp://127.1.2.3:1234/vhost":         {},
		"amqp://[::1]":                        {},
		"amqps://broker.example":              {},
		"amqp://broker.example":               {AllowPlaintext: true},
		" amqp://127.0.0.1 , amqp://[::1]/x ": {},
	} {
		if _, err := NewDialer(urls, cfg); err != nil {
			t.Errorf("%s: %s", urls, err)
		}
	}
}

// The password is taken as it is, whatever is in it.
func TestDialSendsAnyPassword(t *testing.T) {
	const password = "?#@:/% ,é"
	u := parse(t, testenv.AMQPURL(t))
	u.User = url.UserPassword("nobody", password)
	raw := strings.ReplaceAll(u.String(), ",", "%2C")
	parsed, err := amqp.ParseURI(raw)
	must(t, err)
	if parsed.Password != password {
		t.Errorf("sent %q", parsed.Password)
	}
	_, err = dialer(t, raw, Config{}).Dial(testenv.Context(t))
	if err == nil || strings.Contains(err.Error(), "/% ") {
		t.Error(err)
	}
}

func TestDialGoesOnToAHostThatAnswersAndShowsNoPassword(t *testing.T) {
	dead := "amqp://u:S3cret@" + closedPort(t)
	d := dialer(t, dead+","+testenv.AMQPURL(t), Config{Name: "a test"})
	for range 3 {
		conn, err := d.Dial(testenv.Context(t))
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
	_, err := dialer(t, dead, Config{}).Dial(testenv.Context(t))
	if err == nil || strings.Contains(err.Error(), "S3cret") {
		t.Error(err)
	}
}

func TestDialAsksForCredentialsEachTime(t *testing.T) {
	asked := 0
	u := parse(t, testenv.AMQPURL(t))
	password, _ := u.User.Password()
	user := u.User.Username()
	u.User = url.UserPassword("nobody", "wrong")
	d := dialer(t, u.String(), Config{Credentials: func(context.Context) (string, string, error) {
		asked++
		return user, password, nil
	}})
	for want := 1; want <= 2; want++ {
		conn, err := d.Dial(testenv.Context(t))
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		if asked != want {
			t.Errorf("asked %d times for %d dials", asked, want)
		}
	}
}

// silent accepts and never answers.
func silent(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return listener.Addr().String()
}

func TestDialToASilentHostEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(testenv.Context(t))
	d := dialer(t, "amqp://"+silent(t), Config{})
	result := make(chan error, 1)
	go func() {
		_, err := d.Dial(ctx)
		result <- err
	}()
	cancel()
	select {
	case err := <-result:
		if err == nil {
			t.Error("a silent host was dialled")
		}
	case <-time.After(5 * time.Second):
		t.Fatal("Dial outlives its context")
	}
}

// tlsFront ends TLS before the broker, with a certificate for host that is valid
// until the time given.
func tlsFront(t *testing.T, host string, until time.Time) (address string, roots *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{host},
		NotBefore: until.Add(-24 * time.Hour), NotAfter: until,
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	leaf, err := x509.ParseCertificate(der)
	must(t, err)
	roots = x509.NewCertPool()
	roots.AddCert(leaf)
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	})
	must(t, err)
	broker := parse(t, testenv.AMQPURL(t)).Host
	served := make(chan struct{})
	t.Cleanup(func() { listener.Close(); <-served })
	go func() {
		defer close(served)
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			join(client, broker)
		}
	}()
	return listener.Addr().String(), roots
}

// join copies between client and broker until one of them ends.
func join(client net.Conn, broker string) {
	defer client.Close()
	if client.(*tls.Conn).Handshake() != nil {
		return
	}
	server, err := net.Dial("tcp", broker)
	if err != nil {
		return
	}
	defer server.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(client, bufio.NewReader(server))
		client.Close()
	}()
	io.Copy(server, client)
	server.Close()
	<-done
}

func TestTLSIsVerified(t *testing.T) {
	later, past := time.Now().Add(time.Hour), time.Now().Add(-time.Hour)
	for name, test := range map[string]struct {
		host   string
		until  time.Time
		config func(roots *x509.CertPool) *tls.Config
		want   string
	}{
		"good":          {"localhost", later, trust, ""},
		"wrong host":    {"elsewhere", later, trust, "elsewhere"},
		"expired":       {"localhost", past, trust, "expired"},
		"unknown":       {"localhost", later, func(*x509.CertPool) *tls.Config { return nil }, "unknown authority"},
		"name by hand":  {"elsewhere", later, func(r *x509.CertPool) *tls.Config { return &tls.Config{RootCAs: r, ServerName: "elsewhere"} }, ""},
		"no such roots": {"localhost", later, func(*x509.CertPool) *tls.Config { return &tls.Config{RootCAs: x509.NewCertPool()} }, "unknown authority"},
	} {
		t.Run(name, func(t *testing.T) {
			address, roots := tlsFront(t, test.host, test.until)
			u := parse(t, testenv.AMQPURL(t))
			_, port, err := net.SplitHostPort(address)
			must(t, err)
			u.Scheme, u.Host = "amqps", net.JoinHostPort("localhost", port)
			d := dialer(t, u.String(), Config{TLS: test.config(roots)})
			for range 2 { // the first dial leaves the configuration as it was
				conn, err := d.Dial(testenv.Context(t))
				if err == nil {
					conn.Cut()
					conn.Close()
				}
				if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
					t.Errorf("want %q, got %v", test.want, err)
				}
			}
		})
	}
}

func trust(roots *x509.CertPool) *tls.Config { return &tls.Config{RootCAs: roots} }

func TestCutEndsWhatWaits(t *testing.T) {
	conn, err := dialer(t, testenv.AMQPURL(t), Config{}).Dial(testenv.Context(t))
	must(t, err)
	closed := conn.NotifyClose(make(chan *amqp.Error, 1))
	conn.Cut()
	select {
	case <-closed:
	case <-time.After(5 * time.Second):
		t.Fatal("a cut connection lives")
	}
}

func dialer(t *testing.T, urls string, cfg Config) *Dialer {
	t.Helper()
	d, err := NewDialer(urls, cfg)
	must(t, err)
	return d
}

func closedPort(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer listener.Close()
	return listener.Addr().String()
}

func parse(t *testing.T, raw string) *url.URL {
	t.Helper()
	first, _, _ := strings.Cut(raw, ",")
	u, err := url.Parse(first)
	must(t, err)
	return u
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
