package relay_test

import (
	"context"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/servers/serverstest"
	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
	"github.com/txbox/txbox/relay"
)

// A producer with synchronous_commit=off sees its commit before it is on disk, and
// so does a relay. All processes of PostgreSQL are killed again and again: what a
// crash took back was never published, and everything else was.
func TestWhatACrashTakesBackWasNeverPublished(t *testing.T) {
	t.Parallel()
	server := serverstest.Postgres(t)
	b := setupAt(t, server.URL(), testenv.AMQPURL(t))
	ctx := testenv.Context(t)
	b.leaveCommitsOffTheDisk()
	_, stop := b.start(brisk)
	committed := 0
	for range 6 {
		committed += b.produceUntilKilled(func() { b.must(server.Kill()) })
		b.must(server.Start(ctx))
		testenv.Eventually(t, 20*time.Second, "the database answers", func() bool { return b.db.Ping(ctx) == nil })
	}
	b.eventuallyCount("outbox", 0)
	stop()

	b.checkGhosts(committed)
}

// The relay has read its pages while the broker was away; PostgreSQL crashes and
// recovers, and only then does the broker take messages.
func TestPageThatOutlivesACrashHoldsNoGhosts(t *testing.T) {
	t.Parallel()
	server := serverstest.Postgres(t)
	b := setupAt(t, server.URL(), testenv.AMQPURL(t))
	ctx := testenv.Context(t)
	direct, err := url.Parse(b.amqpURL)
	b.must(err)
	way := newGate(t, direct.Host)
	b.amqpURL = way.url(*direct)
	b.leaveCommitsOffTheDisk()
	r, stop := b.start(func(cfg *relay.Config, _ *relay.RabbitMQConfig) { cfg.Lease = time.Minute })
	testenv.Eventually(t, 20*time.Second, "ready", func() bool { return r.Ready() == nil })
	way.shut()
	committed := 0
	for range 3 {
		committed += b.produceUntilKilled(func() {
			testenv.Eventually(t, 20*time.Second, "some are in the hand", func() bool { return r.Stats().InHand > 0 })
			b.must(server.Kill())
		})
		b.must(server.Start(ctx))
		testenv.Eventually(t, 20*time.Second, "the database answers", func() bool { return b.db.Ping(ctx) == nil })
	}
	way.open()
	b.eventuallyCount("outbox", 0)
	stop()
	b.checkGhosts(committed)
}

func (b *bundle) leaveCommitsOffTheDisk() {
	b.Helper()
	for _, statement := range []string{
		"ALTER SYSTEM SET wal_writer_delay = '10s'",
		"ALTER SYSTEM SET wal_writer_flush_after = '1GB'",
		"SELECT pg_reload_conf()",
		"CREATE TABLE business (message_id uuid PRIMARY KEY)",
	} {
		_, err := b.db.Exec(testenv.Context(b), statement)
		b.must(err)
	}
}

// checkGhosts fails unless what was published is what the business knows, which is
// less than what was committed.
func (b *bundle) checkGhosts(committed int) {
	b.Helper()
	rows, err := b.db.Query(testenv.Context(b), "SELECT message_id::text FROM business")
	b.must(err)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	b.must(err)
	published := map[string]bool{}
	for _, d := range b.drain(b.queue, len(ids)) {
		published[d.MessageId] = true
	}
	for _, id := range ids {
		if !published[id] {
			b.Errorf("%s was committed and is not published", id)
		}
		delete(published, id)
	}
	if len(published) != 0 {
		b.Errorf("%d ghosts: published, but their transactions never were", len(published))
	}
	b.Logf("%d of %d commits survived", len(ids), committed)
	if len(ids) >= committed {
		b.Error("no commit was taken back: this test has shown nothing")
	}
}

// produceUntilKilled commits from several producers until kill has been done, which
// is as soon as some have committed. It returns how many did.
func (b *bundle) produceUntilKilled(kill func()) (committed int) {
	b.Helper()
	ctx := testenv.Context(b)
	var mu sync.Mutex
	some := make(chan struct{})
	var producers sync.WaitGroup
	for range 4 {
		producers.Go(func() {
			for b.produce(ctx) == nil {
				mu.Lock()
				if committed++; committed == 50 {
					close(some)
				}
				mu.Unlock()
			}
		})
	}
	select {
	case <-some:
	case <-ctx.Done():
		b.Fatal("nothing is committed")
	}
	kill()
	producers.Wait()
	return committed
}

func (b *bundle) produce(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	m := outbox.Message{ID: outbox.NewID(), Exchange: b.queue}
	return pgx.BeginFunc(ctx, b.db, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SET LOCAL synchronous_commit = off"); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "INSERT INTO business VALUES ($1)", m.ID); err != nil {
			return err
		}
		return b.writer.Write(ctx, tx, m)
	})
}
