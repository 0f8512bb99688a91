package relay_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
)

// manyKeys is enough keys for some in most lanes.
const manyKeys = 200

// lock locks the row of the message that has so many before it.
func (b *bundle) lock(before int) pgx.Tx {
	b.Helper()
	tx := b.begin()
	outbox := b.db.Table("outbox")
	_, err := tx.Exec(testenv.Context(b.T), "SELECT FROM "+outbox+" WHERE id = (SELECT id FROM "+outbox+" ORDER BY id OFFSET $1 LIMIT 1) FOR UPDATE", before)
	b.must(err)
	return tx
}

// An operator deletes a parked message and takes his time to commit. Nobody else waits.
func TestRowThatAnOperatorHasLockedHoldsUpNobody(t *testing.T) {
	t.Parallel()
	b := setup(t)
	queue, declare := b.absent()
	b.write(to(queue, b.messages(3, noKey))...)
	b.start()
	b.eventuallyCount("outbox_parked", 3)
	ctx := testenv.Context(t)
	operator, err := b.db.Begin(ctx)
	b.must(err)
	defer operator.Rollback(ctx)
	_, err = operator.Exec(ctx, "DELETE FROM "+b.db.Table("outbox_parked")+" WHERE id = (SELECT min(id) FROM "+b.db.Table("outbox_parked")+")")
	b.must(err)
	msgs := b.messages(3000, noKey)
	for i := range 6 {
		b.write(msgs[500*i : 500*(i+1)]...)
		b.must(pauseFor(t, 500*time.Millisecond)) // the locked one is due meanwhile
	}
	b.checkAll(b.drain(b.queue, len(msgs)), msgs, 0)
	b.eventuallyCount("outbox", 0)
	declare()
	b.eventuallyCount("outbox_parked", 1) // confirmed, and not ours to delete
	if got := b.drain(queue, 3); len(got) != 3 {
		t.Errorf("%d deliveries of 3 messages", len(got))
	}
	b.must(operator.Commit(ctx))
	b.eventuallyCount("outbox_parked", 0)
}

// Somebody locks many rows of the outbox, one here and one there, and does not go on.
func TestManyLockedRowsHoldUpNobody(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const locked = 100
	msgs := b.messages(3*locked, noKey)
	b.write(msgs...)
	tx := b.begin()
	_, err := tx.Exec(testenv.Context(t), "SELECT FROM "+b.db.Table("outbox")+" WHERE id % 3 = 0 FOR UPDATE")
	b.must(err)
	b.start()
	for range 3 {
		more := b.messages(500, noKey)
		b.write(more...)
		msgs = append(msgs, more...)
		testenv.Eventually(t, 10*time.Second, "only the locked rows are left", func() bool { return b.count("outbox") == locked })
	}
	b.checkAll(b.drain(b.queue, len(msgs)), msgs, 0)
	b.must(tx.Rollback(testenv.Context(t)))
	b.eventuallyCount("outbox", 0)
}

// Somebody has locked the row of a lane, a message of which the broker refuses again and
// again. What is confirmed is deleted all the same, of all lanes.
func TestLaneThatIsLockedHoldsUpNoDeletes(t *testing.T) {
	t.Parallel()
	b := setup(t)
	queue, declare := b.absent()
	refused := to(queue, b.messages(1, noKey))
	b.write(refused...)
	b.start(brisk)
	b.eventuallyCount("outbox_parked", 1)
	tx := b.begin()
	_, err := tx.Exec(testenv.Context(t), "SELECT FROM "+b.db.Table("outbox_lane")+" WHERE lane = (SELECT lane FROM "+b.db.Table("outbox_parked")+") FOR UPDATE")
	b.must(err)
	var msgs []outbox.Message
	for range 8 {
		more := b.messages(100, noKey)
		b.write(more...)
		msgs = append(msgs, more...)
		b.must(pauseFor(t, time.Second)) // it is refused meanwhile
	}
	b.eventuallyCount("outbox", 0)
	b.must(tx.Rollback(testenv.Context(t)))
	declare()
	b.checkAll(b.drain(queue, 1), refused, 0)
	b.checkAll(b.drain(b.queue, len(msgs)), msgs, 0)
	b.eventuallyCount("outbox_parked", 0)
}

// Somebody locks the row of a message for a while. When that is over it is deleted,
// though others come and go all the time.
func TestLockedRowIsSettledWhileTrafficGoesOn(t *testing.T) {
	t.Parallel()
	b := setup(t)
	msgs := b.messages(1, noKey)
	b.write(msgs...)
	lock := b.lock(0)
	r, _ := b.start()
	ctx, stop := context.WithCancel(testenv.Context(t))
	traffic := make(chan struct{})
	go func() {
		defer close(traffic)
		for ctx.Err() == nil {
			b.write(b.messages(1, noKey)...)
			_ = pauseFor(t, 50*time.Millisecond)
		}
	}()
	defer func() { stop(); <-traffic }()
	testenv.Eventually(t, 20*time.Second, "others are published", func() bool { return r.Stats().Published >= 20 })
	b.must(lock.Rollback(ctx))
	testenv.Eventually(t, 10*time.Second, "the locked row is deleted", func() bool {
		var n int
		b.must(b.db.QueryRow(ctx, "SELECT count(*) FROM "+b.db.Table("outbox")+" WHERE message_id = $1", msgs[0].ID).Scan(&n))
		return n == 0
	})
}

// Rows that stay locked are told of, and when that is over.
func TestLockedRowsAreTold(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.write(b.messages(1, noKey)...)
	lock := b.lock(0)
	log := &lockedBuffer{}
	r, _ := b.start(b.logTo(log))
	testenv.Eventually(t, 40*time.Second, "told", func() bool { return log.lines("1 rows are locked by other sessions") == 1 })
	if err := r.Ready(); err != nil {
		t.Errorf("not ready, since one message cannot be deleted: %v", err)
	}
	b.must(lock.Rollback(testenv.Context(t)))
	testenv.Eventually(t, 20*time.Second, "over", func() bool { return log.lines("settling of locked rows works") == 1 })
	b.eventuallyCount("outbox", 0)
}

// The row of a message is locked when its lane is to go to another relay: the others of
// its key do not wait for the lock. It may be published twice, after all.
func TestLockedRowDoesNotKeepItsLane(t *testing.T) {
	t.Parallel()
	b := setup(t)
	msgs := b.messages(2*manyKeys, func(i int) string { return fmt.Sprint("k", i%manyKeys) })
	b.write(msgs[:manyKeys]...)
	tx := b.begin()
	_, err := tx.Exec(testenv.Context(t), "SELECT FROM "+b.db.Table("outbox")+" FOR UPDATE")
	b.must(err)
	first, _ := b.start(brisk)
	got := b.drain(b.queue, manyKeys)
	second, _ := b.start(brisk)
	testenv.Eventually(t, 20*time.Second, "half of the lanes each", func() bool {
		return first.Stats().Lanes == 32 && second.Stats().Lanes == 32
	})
	b.write(msgs[manyKeys:]...)
	deliveries, seen := b.deliveries(), make(map[string]bool)
	limit := time.After(20 * time.Second)
	for len(seen) < manyKeys {
		select {
		case d := <-deliveries:
			got = append(got, d)
			for _, m := range msgs[manyKeys:] {
				if d.MessageId == m.ID.String() {
					seen[d.MessageId] = true
				}
			}
		case <-limit:
			t.Fatalf("%d of %d messages came while rows before them were locked", len(seen), manyKeys)
		}
	}
	b.checkAll(got, msgs, manyKeys)
	b.checkOrder(got, msgs)
	b.must(tx.Rollback(testenv.Context(t)))
	b.eventuallyCount("outbox", 0)
}

// The row of a message that the broker refuses is locked, and its lane goes to another
// relay, and back. What follows it is not parked, nor sent, before it.
func TestRefusedMessageThatIsLockedStaysBeforeItsFollowers(t *testing.T) {
	t.Parallel()
	b := setup(t)
	queue, declare := b.absent()
	msgs := to(queue, b.messages(4, func(int) string { return "k" }))
	b.write(msgs[:2]...)
	lock := b.lock(0)
	_, stopFirst := b.start(brisk)
	b.must(pauseFor(t, 2*time.Second))
	if n := b.count("outbox_parked"); n != 0 {
		t.Errorf("%d followers parked before their head", n)
	}
	_, stopSecond := b.start(brisk)
	b.write(msgs[2])
	b.must(pauseFor(t, 2*time.Second))
	stopFirst()
	b.write(msgs[3])
	b.must(pauseFor(t, 2*time.Second))
	declare()
	b.must(lock.Rollback(testenv.Context(t)))
	got := b.drain(queue, len(msgs))
	b.checkAll(got, msgs, 1)
	b.checkOrder(got, msgs)
	stopSecond()
}

// The row of a message that is to be parked behind another is locked. What follows it is
// not parked before it: it would be sent first if the relay died then.
func TestFollowerThatIsLockedStaysBeforeItsFollowers(t *testing.T) {
	t.Parallel()
	b := setup(t)
	queue, declare := b.absent()
	msgs := to(queue, b.messages(4, func(int) string { return "k" }))
	b.write(msgs[:3]...)
	lock := b.lock(1)
	b.start()
	b.eventuallyCount("outbox_parked", 1)
	b.write(msgs[3])
	b.must(pauseFor(t, 2*time.Second))
	if n := b.count("outbox_parked"); n != 1 {
		t.Errorf("%d parked, while the second of them cannot be", n)
	}
	b.must(lock.Rollback(testenv.Context(t)))
	b.eventuallyCount("outbox_parked", len(msgs))
	declare()
	got := b.drain(queue, len(msgs))
	b.checkAll(got, msgs, 0)
	b.checkOrder(got, msgs)
}
