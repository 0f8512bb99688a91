package inbox_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	_ "github.com/jackc/pgx/v5/stdlib"
	_ "github.com/lib/pq"
	"go.uber.org/goleak"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

func TestMain(m *testing.M) {
	if queue := os.Getenv(queueVar); queue != "" {
		consumeForEver(queue)
	}
	goleak.VerifyTestMain(m)
}

// env is a schema with a table of effects, which no constraint keeps unique.
type env struct {
	*testenv.DB
	inbox.Recorder
	ctx context.Context
}

func setup(t *testing.T) *env {
	t.Helper()
	return setupAt(t, testenv.DatabaseURL(t))
}

// setupAt is setup on a server of the test's own.
func setupAt(t *testing.T, databaseURL string) *env {
	t.Helper()
	db := testenv.SchemaAt(t, databaseURL)
	e := &env{DB: db, Recorder: inbox.Recorder{Schema: db.Schema}, ctx: testenv.Context(t)}
	e.exec(t, "CREATE TABLE "+e.Table("effects")+" (message_id text NOT NULL, attempt integer, seq bigint GENERATED ALWAYS AS IDENTITY)")
	return e
}

func (e *env) exec(t *testing.T, sql string, args ...any) {
	t.Helper()
	if _, err := e.DB.Exec(e.ctx, sql, args...); err != nil {
		t.Fatal(err)
	}
}

func (e *env) effectSQL() string { return "INSERT INTO " + e.Table("effects") + " VALUES ($1)" }

// count returns how many rows of table match condition.
func (e *env) count(t *testing.T, table, condition string, args ...any) (n int) {
	t.Helper()
	err := e.QueryRow(e.ctx, "SELECT count(*) FROM "+e.Table(table)+" WHERE "+condition, args...).Scan(&n)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// want fails the test unless id has this many records and effects.
func (e *env) want(t *testing.T, id string, records, effects int) {
	t.Helper()
	r, f := e.count(t, "inbox", "message_id = $1", id), e.count(t, "effects", "message_id = $1", id)
	if r != records || f != effects {
		t.Errorf("%s: %d records and %d effects, want %d and %d", id, r, f, records, effects)
	}
}

// pool opens another pool, to dbURL, which is closed when the test ends.
func (e *env) pool(t *testing.T, dbURL string) *pgxpool.Pool {
	t.Helper()
	pool, err := pgxpool.New(e.ctx, dbURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

// serializable returns the database's URL with another default isolation level.
func (e *env) serializable(t *testing.T) string {
	return withParam(t, e.URL, "default_transaction_isolation", "serializable")
}

func withParam(t *testing.T, raw, name, value string) string {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	query := u.Query()
	query.Set(name, value)
	u.RawQuery = strings.ReplaceAll(query.Encode(), "+", "%20") // pgx takes a + for itself
	return u.String()
}

// proxy stands between a client and a server, and breaks what it is told to.
type proxy struct {
	url string // of the server, through the proxy

	dials    atomic.Int64 // connections asked for
	listener net.Listener
	target   string
	tasks    sync.WaitGroup

	mu    sync.Mutex
	down  bool
	conns map[net.Conn]bool
	// onWrite, if set, sees what a client sends. cut: the connections are closed
	// before the server gets it; swallow: after the server answered it.
	onWrite func(b []byte) (cut, swallow bool)
}

func newProxy(t *testing.T, serverURL string) *proxy {
	t.Helper()
	u, err := url.Parse(serverURL)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: listener, target: u.Host, conns: map[net.Conn]bool{}}
	u.Host = listener.Addr().String()
	p.url = u.String()
	p.tasks.Go(p.accept)
	t.Cleanup(func() {
		listener.Close()
		p.setDown(true)
		p.tasks.Wait()
	})
	return p
}

func (p *proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.dials.Add(1)
		p.tasks.Go(func() { p.serve(client) })
	}
}

func (p *proxy) serve(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer server.Close()
	if !p.register(client, server) {
		return
	}
	swallow := make(chan struct{})
	p.tasks.Go(func() {
		defer client.Close()
		defer server.Close()
		b := make([]byte, 64<<10)
		for {
			n, err := server.Read(b)
			select {
			case <-swallow:
				return
			default:
			}
			if _, werr := client.Write(b[:n]); err != nil || werr != nil {
				return
			}
		}
	})
	b := make([]byte, 64<<10)
	for {
		n, err := client.Read(b)
		cut, drop := p.look(b[:n])
		if cut {
			return
		}
		if drop {
			close(swallow)
		}
		if _, werr := server.Write(b[:n]); err != nil || werr != nil {
			return
		}
		if drop {
			_, _ = io.Copy(io.Discard, client) // until the other side has the answer
			return
		}
	}
}

func (p *proxy) register(conns ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, conn := range conns {
		p.conns[conn] = true
	}
	return !p.down
}

func (p *proxy) look(b []byte) (cut, swallow bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.onWrite == nil {
		return false, false
	}
	return p.onWrite(b)
}

// cut closes all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.conns {
		conn.Close()
		delete(p.conns, conn)
	}
}

// setDown cuts, and refuses new connections until told otherwise.
func (p *proxy) setDown(down bool) {
	p.mu.Lock()
	p.down = down
	p.mu.Unlock()
	p.cut()
}

// lockedBuffer is a log that a test reads.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
