package relay_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/servers/serverstest"
	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/relay"
)

// Each of 64 relays has a lane; a 65th waits until one of them goes.
func TestSixtyFourRelaysShareAndTheNextWaits(t *testing.T) {
	t.Parallel()
	b := setup(t)
	calm := func(cfg *relay.Config, _ *relay.RabbitMQConfig) { // all share one pool and two cores
		cfg.IdleInterval, cfg.Lease = time.Second, time.Minute
	}
	var relays []*relay.Relay
	var stops []func()
	add := func() {
		r, stop := b.start(calm)
		relays, stops = append(relays, r), append(stops, stop)
	}
	shared := func(among []*relay.Relay) bool {
		for _, r := range among {
			if r.Stats().Lanes != 1 {
				return false
			}
		}
		return true
	}
	for range 64 {
		add()
	}
	testenv.Eventually(t, time.Minute, "one lane each", func() bool { return shared(relays) })
	add()
	msgs := b.messages(2000, func(i int) string { return fmt.Sprint("k", i%300) })
	b.write(msgs...)
	got := b.drain(b.queue, len(msgs))
	b.checkAll(got, msgs, 0)
	b.checkOrder(got, msgs)
	if n := relays[64].Stats().Lanes; n != 0 {
		t.Errorf("the 65th has %d lanes", n)
	}
	b.must(relays[64].Ready())
	stops[0]()
	testenv.Eventually(t, 20*time.Second, "the 65th has a lane", func() bool { return shared(relays[1:]) })
}

// A pooler gives each transaction another session, and a session to many clients.
func TestRelaysWorkThroughATransactionPooler(t *testing.T) {
	t.Parallel()
	b := setup(t)
	direct := b.db.Pool
	var stops []func()
	for range 2 {
		pool, err := pgxpool.New(testenv.Context(t), pooled(t, b.db.URL))
		b.must(err)
		t.Cleanup(pool.Close)
		b.db.Pool = pool
		_, stop := b.start(brisk)
		stops = append(stops, stop)
	}
	b.db.Pool = direct
	msgs := b.messages(5000, func(i int) string { return fmt.Sprint("k", i%50) })
	late := testenv.Name(t)
	for i := range msgs {
		if i%50 == 7 {
			msgs[i].Exchange = late
		}
	}
	b.write(msgs[:4000]...)
	testenv.Eventually(t, 20*time.Second, "they are parked", func() bool { return b.count("outbox_parked") >= 80 })
	stops[0]()
	b.write(msgs[4000:]...)
	b.declare(late)
	defer b.ch.ExchangeDelete(late, false, false)
	defer b.ch.QueueDelete(late, false, false, false)
	b.must(b.ch.QueueBind(b.queue, "", late, false, nil))
	got := b.drain(b.queue, len(msgs))
	b.checkAll(got, msgs, inFlight) // the missing exchange closes channels
	b.checkOrder(got, msgs)
	b.eventuallyCount("outbox", 0)
	b.eventuallyCount("outbox_parked", 0)
	stops[1]()
	b.eventuallyCount("outbox_relay", 0)
}

// A dead head holds 2,000 followers; the others pass by, and when the head is
// discarded they come in order.
func TestKeyWithManyFollowersCostsTheOthersNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	head := b.messages(1, func(int) string { return "blocked" })
	_, err := b.db.Exec(testenv.Context(t), `INSERT INTO `+b.db.Table("outbox_parked")+` (message_id, key, exchange, reason)
		VALUES ($1, 'blocked', $2, 'dead')`, head[0].ID, b.queue)
	b.must(err)
	msgs := b.messages(2200, func(i int) string {
		if i%11 != 0 {
			return "blocked"
		}
		return fmt.Sprint("k", i%1000)
	})
	b.write(msgs...)
	r, _ := b.start()
	others := len(msgs) / 11
	testenv.Eventually(t, 30*time.Second, "the others are published", func() bool { return r.Stats().Published == int64(others) })
	b.eventuallyCount("outbox", 0)
	if n := b.count("outbox_parked"); n != len(msgs)-others+1 {
		t.Errorf("%d are parked", n)
	}
	_, err = b.db.Exec(testenv.Context(t), `DELETE FROM `+b.db.Table("outbox_parked")+` WHERE reason = 'dead'`)
	b.must(err)
	got := b.drain(b.queue, len(msgs))
	b.checkAll(got, msgs, 0)
	b.checkOrder(got, msgs)
	b.eventuallyCount("outbox_parked", 0)
}

// pooled returns the URL of a pooler with two sessions, before the database.
func pooled(t *testing.T, databaseURL string) string {
	t.Helper()
	return serverstest.Pgbouncer(t, databaseURL, 2)
}
