package inbox_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/servers/serverstest"
	"github.com/txbox/txbox/internal/testenv"
)

// With synchronous_commit=off a commit is on disk some time after it returned. By
// then the message is acknowledged: a crash must not take the commit back.
func TestWhatWasAcknowledgedOutlivesACrashWithoutSynchronousCommit(t *testing.T) {
	t.Parallel()
	server := serverstest.Postgres(t)
	e := setupAt(t, server.URL())
	e.exec(t, "ALTER SYSTEM SET wal_writer_delay = '10s'")
	e.exec(t, "ALTER SYSTEM SET wal_writer_flush_after = '1GB'")
	e.exec(t, "ALTER SYSTEM SET synchronous_commit = 'off'")
	e.exec(t, "SELECT pg_reload_conf()")
	testenv.Eventually(t, 20*time.Second, "synchronous_commit is off", func() bool {
		var value string
		return e.QueryRow(e.ctx, "SHOW synchronous_commit").Scan(&value) == nil && value == "off"
	})
	b := setupBrokerOf(t, e, testenv.AMQPURL(t))
	const n = 50
	b.publish(t, numbered(n)...)
	noID := numbered(1)[0]
	noID.MessageId = ""
	b.publish(t, noID)
	c := b.start(t, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.ID == "7" {
			return inbox.Reject(context.Canceled)
		}
		return b.apply(ctx, tx, m)
	})
	b.wantReady(t, 0)
	c.waitFor(t, "all settled", func(s inbox.Stats) bool {
		parked := uint64(0)
		for _, count := range s.Parked {
			parked += count
		}
		return s.Applied+parked == n+1
	})
	b.wantReady(t, 0)
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := server.Start(e.ctx); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, 20*time.Second, "the database answers", func() bool { return e.Ping(e.ctx) == nil })
	c.stop()
	if got := e.count(t, "effects", "true") + e.count(t, "inbox_parked", "true"); got != n+1 {
		t.Errorf("%d of %d acknowledged messages are applied or parked", got, n+1)
	}
}

type shopError struct{ text string }

func (e *shopError) Error() string { return e.text }

// A nil pointer in an error is not nil.
func TestHandlerThatReturnsATypedNilErrorFailsLikeAnyOther(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(1)...)
	log := &lockedBuffer{}
	cfg := b.config(t)
	cfg.Logger = log.logger()
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(context.Context, pgx.Tx, inbox.Message) error { return (*shopError)(nil) }, cfg)
	c.waitFor(t, "a failure", func(s inbox.Stats) bool { return s.Failures >= 1 })
	c.stop()
	if n := strings.Count(log.String(), "a message is parked"); n == 0 {
		t.Errorf("%d lines in the log", n)
	}
	if n := b.count(t, "inbox_parked", "last_error LIKE '%shopError%'"); n != 1 {
		t.Errorf("%d parked", n)
	}
}
