package faultproxy_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/goleak"

	"github.com/txbox/txbox/internal/faultproxy"
	"github.com/txbox/txbox/internal/testenv"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo is a server that answers what it is sent.
func echo(t *testing.T, protocol faultproxy.Protocol) *faultproxy.Proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() { defer conn.Close(); io.Copy(conn, conn) }()
		}
	}()
	p := through(t, listener.Addr().String(), protocol)
	t.Cleanup(func() { listener.Close(); <-done })
	return p
}

func through(t *testing.T, target string, protocol faultproxy.Protocol) *faultproxy.Proxy {
	t.Helper()
	p, err := faultproxy.New(target, protocol)
	must(t, err)
	t.Cleanup(p.Close)
	return p
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func dial(t *testing.T, p *faultproxy.Proxy) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", p.Address())
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// ask sends text and returns what comes back within limit.
func ask(t *testing.T, conn net.Conn, text string, limit time.Duration) (string, error) {
	t.Helper()
	if _, err := conn.Write([]byte(text)); err != nil {
		return "", err
	}
	must(t, conn.SetReadDeadline(time.Now().Add(limit)))
	answer := make([]byte, len(text))
	n, err := io.ReadFull(conn, answer)
	return string(answer[:n]), err
}

const (
	soon  = 10 * time.Second
	while = 100 * time.Millisecond // in which nothing comes
)

func answers(t *testing.T, conn net.Conn) {
	t.Helper()
	if answer, err := ask(t, conn, "hello", soon); err != nil || answer != "hello" {
		t.Fatalf("answer %q, %v", answer, err)
	}
}

func TestAHealthyProxyForwards(t *testing.T) {
	p := echo(t, faultproxy.Raw)
	answers(t, dial(t, p))
	answers(t, dial(t, p))
}

func TestCutResetsLinksAndTakesNewOnes(t *testing.T) {
	p := echo(t, faultproxy.Raw)
	conn := dial(t, p)
	answers(t, conn)
	p.Cut()
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("want a reset, got %v", err)
	}
	answers(t, dial(t, p))
}

func TestRefuseRefusesUntilHeal(t *testing.T) {
	p := echo(t, faultproxy.Raw)
	conn := dial(t, p)
	answers(t, conn)
	p.Refuse()
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("want a reset, got %v", err)
	}
	if _, err := net.Dial("tcp", p.Address()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("want a refusal, got %v", err)
	}
	must(t, p.Heal())
	answers(t, dial(t, p))
}

func TestWhatVanishesDoesNotComeBackWithHeal(t *testing.T) {
	p := echo(t, faultproxy.Raw)
	conn := dial(t, p)
	answers(t, conn)
	p.Vanish()
	later := dial(t, p) // a black hole takes these, too
	for range 2 {
		for _, conn := range []net.Conn{conn, later} {
			if _, err := ask(t, conn, "hello", while); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("want silence, got %v", err)
			}
		}
		must(t, p.Heal())
	}
	answers(t, dial(t, p))
}

func TestStallStopsReadingAndDeliversAfterHeal(t *testing.T) {
	p := echo(t, faultproxy.Raw)
	conn := dial(t, p)
	answers(t, conn)
	p.Stall()
	if _, err := ask(t, conn, "hello", while); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("want silence, got %v", err)
	}
	must(t, conn.SetWriteDeadline(time.Now().Add(time.Second)))
	written, err := conn.Write(make([]byte, 64<<20))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("64 MiB were taken: %v", err)
	}
	must(t, p.Heal())
	must(t, conn.SetReadDeadline(time.Now().Add(soon)))
	if n, err := io.CopyN(io.Discard, conn, int64(len("hello")+written)); err != nil {
		t.Errorf("%d bytes came after Heal: %v", n, err)
	}
}

func TestSlowKeepsToItsRate(t *testing.T) {
	p := echo(t, faultproxy.Raw)
	conn := dial(t, p)
	answers(t, conn)
	p.Slow(100)
	if _, err := ask(t, conn, strings.Repeat("x", 50), while); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("50 bytes at 100 a second: %v", err)
	}
	if _, err := ask(t, conn, "", soon); err != nil {
		t.Error(err)
	}
	must(t, conn.SetReadDeadline(time.Now().Add(soon)))
	if _, err := io.ReadFull(conn, make([]byte, 50)); err != nil {
		t.Errorf("they do not come: %v", err)
	}
}

func TestCutAfterForwardsSoManyBytes(t *testing.T) {
	p := echo(t, faultproxy.Raw)
	conn := dial(t, p)
	p.CutAfter(5 + 5 + 3) // there, back, there
	answers(t, conn)
	if answer, err := ask(t, conn, "hello", soon); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("answer %q, %v", answer, err)
	}
	answers(t, dial(t, p))
}

// The server commits, and the client never hears of it.
func TestInterceptSeesPostgreSQLCommit(t *testing.T) {
	server := testenv.DatabaseURL(t)
	p := through(t, hostOf(t, server), faultproxy.PostgreSQL)
	for _, committed := range []bool{false, true} {
		ctx, cancel := context.WithTimeout(t.Context(), soon)
		defer cancel()
		conn, err := pgx.Connect(ctx, p.URL(server))
		must(t, err)
		defer conn.Close(ctx)
		_, err = conn.Exec(ctx, "CREATE TEMPORARY TABLE t (n integer)")
		must(t, err)
		var commits atomic.Int64
		p.Intercept(func(f faultproxy.Frame) faultproxy.Action {
			switch {
			case f.IsCommit() && commits.Add(1) == 1 && !committed:
				return faultproxy.CutBefore
			case f.IsCommitted():
				commits.Add(10)
				return faultproxy.CutBefore
			}
			return faultproxy.Forward
		})
		err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "INSERT INTO t SELECT generate_series(1, 1000)")
			return err
		})
		want := int64(1)
		if committed {
			want = 11
		}
		if err == nil || commits.Load() != want {
			t.Errorf("committed %t: %d, %v", committed, commits.Load(), err)
		}
		must(t, p.Heal())
	}
}

// The broker confirms, and the publisher never hears of it.
func TestInterceptSeesAMQPConfirm(t *testing.T) {
	server := testenv.AMQPURL(t)
	p := through(t, hostOf(t, server), faultproxy.AMQP)
	conn, err := amqp.Dial(p.URL(server))
	must(t, err)
	defer conn.Close()
	ch, err := conn.Channel()
	must(t, err)
	must(t, ch.Confirm(false))
	queue, err := ch.QueueDeclare("", false, true, true, false, nil)
	must(t, err)
	var published, confirmed atomic.Int64
	p.Intercept(func(f faultproxy.Frame) faultproxy.Action {
		switch {
		case f.FromClient && f.Method() == faultproxy.BasicPublish:
			published.Add(1)
		case !f.FromClient && f.Method() == faultproxy.BasicAck:
			if confirmed.Add(1) == 1 {
				return faultproxy.Drop
			}
		}
		return faultproxy.Forward
	})
	for i := range 2 {
		confirm, err := ch.PublishWithDeferredConfirm("", queue.Name, true, false, amqp.Publishing{Body: make([]byte, 100<<10)})
		must(t, err)
		limit := soon
		if i == 0 {
			limit = time.Second
		}
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		if ok, err := confirm.WaitContext(ctx); (err == nil && ok) != (i == 1) {
			t.Errorf("message %d: confirmed %t, %v", i, ok, err)
		}
	}
	if published.Load() != 2 || confirmed.Load() != 2 {
		t.Errorf("%d published, %d confirmed", published.Load(), confirmed.Load())
	}
}

func hostOf(t *testing.T, server string) string {
	t.Helper()
	host, err := faultproxy.HostOf(server)
	must(t, err)
	return host
}
