// Package rabbit opens connections to RabbitMQ that a dead peer cannot hold: each
// write has a deadline, each dial a limit, and a connection can be cut. Relay and
// consumer both stand on it.
//
// Connections are never mended in place (amqp091-go's Recovery stays off: it
// reuses delivery tags and confirm numbers). Any close throws away the
// connection, its channels and all that was in flight on it.
package rabbit

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Config is how to reach a broker. The zero value works for loopback.
type Config struct {
	// Name is shown in RabbitMQ's list of connections.
	Name string
	// TLS is used for amqps:// URLs; nil verifies against the system's roots.
	TLS *tls.Config
	// Credentials is asked at each dial; nil uses those in the URL.
	Credentials func(context.Context) (user, password string, err error)
	// AllowPlaintext permits amqp:// to a host that is not loopback.
	AllowPlaintext bool
	// WriteTimeout is the longest that a write to the broker may take; default 10 s,
	// from 100 ms to 24 h.
	WriteTimeout time.Duration
}

const minWriteTimeout, maxWriteTimeout = 100 * time.Millisecond, 24 * time.Hour

// dialTimeout bounds one attempt at one host, handshake included.
const dialTimeout = 10 * time.Second

// Dialer dials the hosts of a comma-separated list of URLs in turn.
type Dialer struct {
	cfg  Config
	urls []string
	next atomic.Uint32 // where the next Dial begins
}

// NewDialer checks the whole of urls and cfg; the error names every problem, and
// no password.
func NewDialer(urls string, cfg Config) (*Dialer, error) {
	d := &Dialer{cfg: cfg}
	var problems []error
	for i, raw := range strings.Split(urls, ",") {
		raw = strings.TrimSpace(raw)
		if err := checkURL(raw, cfg.AllowPlaintext); err != nil {
			problems = append(problems, fmt.Errorf("AMQP URL %d: %w", i+1, err))
		}
		d.urls = append(d.urls, raw)
	}
	if cfg.WriteTimeout == 0 {
		d.cfg.WriteTimeout = 10 * time.Second
	}
	if t := d.cfg.WriteTimeout; t < minWriteTimeout || t > maxWriteTimeout {
		problems = append(problems, fmt.Errorf("WriteTimeout: %s is not between %s and %s", t, minWriteTimeout, maxWriteTimeout))
	}
	return d, errors.Join(problems...)
}

// checkURL never quotes what it could not parse: the password may be anywhere
// in it, also in the words of url.Parse's error.
func checkURL(raw string, allowPlaintext bool) error {
	if raw == "" {
		return errors.New("is empty")
	}
	u, err := url.Parse(raw)
	if err != nil {
		return errors.New("malformed; percent-encode special characters in user and password")
	}
	if u.Scheme != "amqp" && u.Scheme != "amqps" || u.Host == "" {
		return errors.New("must be a whole URL, amqp://... or amqps://..., also where several are separated by commas")
	}
	if _, err := amqp.ParseURI(raw); err != nil {
		return errors.New("malformed; percent-encode special characters in user, password and virtual host")
	}
	if port, err := strconv.ParseUint(u.Port(), 10, 16); u.Port() != "" && (err != nil || port == 0) {
		return errors.New("the port is not one of 1 to 65535")
	}
	if u.Scheme == "amqp" && !allowPlaintext && !isLoopback(u.Hostname()) {
		return fmt.Errorf("plaintext to %q, which is not loopback: use amqps://, or set AllowPlaintext", u.Hostname())
	}
	return nil
}

func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}

// Conn is a connection that can be cut.
type Conn struct {
	*amqp.Connection
	socket *gatherConn
}

// Cut closes the socket. Unlike Close it never waits for the peer; everything
// that waits on the connection fails at once.
func (c *Conn) Cut() { c.socket.cut() }

// SetBlocked says whether the broker has sent connection.blocked: it does not read
// then, so no write is late. That it still lives its heartbeats show.
func (c *Conn) SetBlocked(blocked bool) { c.socket.setBlocked(blocked) }

// Dial returns a connection to the first host that answers, beginning with the
// one after the last that was tried. Cancelling ctx ends it; each host gets at
// most 10 s.
func (d *Dialer) Dial(ctx context.Context) (*Conn, error) {
	first := d.next.Add(1) - 1
	var errs []error
	for i := range d.urls {
		conn, err := d.dialOne(ctx, d.urls[(int(first)+i)%len(d.urls)])
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

func (d *Dialer) dialOne(ctx context.Context, rawURL string) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	uri, err := amqp.ParseURI(rawURL)
	if err != nil {
		return nil, errors.New("malformed AMQP URL")
	}
	host := fmt.Sprintf("%s:%d", uri.Host, uri.Port)
	config := amqp.Config{Properties: amqp.NewConnectionProperties()}
	if d.cfg.Name != "" {
		config.Properties.SetClientConnectionName(d.cfg.Name)
	}
	if d.cfg.TLS != nil {
		config.TLSClientConfig = d.cfg.TLS.Clone() // the client writes ServerName into it
	}
	if d.cfg.Credentials != nil {
		user, password, err := d.cfg.Credentials(ctx)
		if err != nil {
			return nil, fmt.Errorf("credentials for %s: %w", host, err)
		}
		// New for each dial: the client wipes the password after use.
		config.SASL = []amqp.Authentication{&amqp.PlainAuth{Username: user, Password: password}}
	}
	conn := &Conn{}
	var stop func() bool
	config.Dial = func(network, addr string) (net.Conn, error) {
		raw, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		conn.socket = newGatherConn(raw, d.cfg.WriteTimeout)
		stop = context.AfterFunc(ctx, conn.Cut) // ends the handshake too
		return conn.socket, nil
	}
	conn.Connection, err = amqp.DialConfig(rawURL, config)
	if stop != nil && !stop() && err == nil {
		conn.Connection.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		if conn.socket != nil {
			conn.Cut()
		}
		return nil, fmt.Errorf("dial %s: %w", host, err)
	}
	return conn, nil
}
