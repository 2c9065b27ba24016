//! What a TPM (swtpm 0.7.1, libtpms 0.9.2) answered to tpm2-tools 5.4, in hexadecimal: `tpm2_createek`, `tpm2_createprimary`,
//! `tpm2_readpublic`, `tpm2_quote`. All PCRs were zero.

/// Endorsement key, RSA-2048 (`TPMT_PUBLIC`).
pub(crate) const EK_RSA2048: &str = "\
    0001000b000300b20020837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa00060080004300100800000000\
    000100e2c4b1fcca5759ea88791f2681ed14ccfff69c7107d14634b6ac73329e78ec0ba85a669675de4c74cdaf06fe29cae4b2e161cd0a\
    e372eee353660ccafc14294b6683feee28036639307f001b764bc2c4c71f6bb8dd8c48dde4466438dbe4a4ba52b692bb93f804b33c1380\
    4cb31d699ba3c0039490815d0e71c60d7cf4b72b3a105e88f9ce5e621d316258afeeb6c51ebb22fa200ec0c91140a54b84fa9bf60c56e3\
    d9aef2baee6d75a210dfe71aad5730b8e8ca80a07b9956f0b00d8ea21b4222353ea76b791fcd7aa1a4d8b84fa3aee9c264e1782ca36282\
    fac14c6875390e261a9e414bc0ceb98fb0461ba469ac78c2e95d0053780cfbccf33ec4695c5f8f";
/// Endorsement key, P-256.
pub(crate) const EK_P256: &str = "\
    0023000b000300b20020837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa00060080004300100003001000\
    203659aece43a9fdc93cbd60c88d523ebaf4766ab300919f253de1ec5f624b231a00203c01fac26713a4fb1f932fc40807ff57614a33dd\
    511cf12a48cbe70464c19457";
/// Endorsement key, P-384.
pub(crate) const EK_P384: &str = "\
    0023000c000300f20030b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3\
    f80e1200060100004300100004001000308fbe6cfdd655e79654341e1fca33f22f3f9952fe7df6f3bba08fcea02fa169ff86fb7361f758\
    bdeebfe45da95316d966003083f7d84ea04586d9336b129075282ca1ac97a20de18e184409bdbb4456798c904027d5f0d7e506ce6bbce3\
    0c8edc72d6";
/// Attestation key from our template, in the endorsement hierarchy.
pub(crate) const AK: &str = "\
    0023000b00050472000000100018000b000300100020e56853e19e5edd1baea61166bb6f47e889339b0cafd073263ed47eec64091f0400\
    2027e6b6b6a031f3c41302476c077abecdf41a21cec6bb6ce193c57ed9ca01d7a3";
/// Its name as the TPM says it.
pub(crate) const AK_NAME: &str = "000b8dda3ac589fb74840aa61af0b43103d45bbf901e8e715c233238327f2159a61b";
/// Its quote over PCR 0, 7 and 15 in the SHA-256 bank, extraData 32 times AB.
pub(crate) const ATTEST: &str = "\
    ff54434780180022000bed2c344615ffa21b17544a95a015acfcb95925b4a0f43cf0fba4eebdf0f50a190020ababababababababababab\
    ababababababababababababababababababababab000000000000087b000000020000000001201910230016363600000001000b038180\
    0000202ea9ab9198d1638007400cd2c3bef1cc745b864b76011a0e1bc52180ac6452d4";
/// `TPMT_SIGNATURE` of it.
pub(crate) const SIGNATURE: &str = "\
    0018000b00202fe85735805866d2796d637b3995afaf95184995463d868efedbb149d0fb42af0020240466decf6f6312d83d1428071f7a\
    114905ed08a967e2735ebbcbb6352c5bb6";
/// The same and PCR 15 in the SHA-384 bank.
pub(crate) const ATTEST_TWO_BANKS: &str = "\
    ff54434780180022000bed2c344615ffa21b17544a95a015acfcb95925b4a0f43cf0fba4eebdf0f50a190020ababababababababababab\
    ababababababababababababababababababababab00000000000008ac000000020000000001201910230016363600000002000b038180\
    00000c03008000002081c611f35bff79491538b2f7cf201c7597a661a5c549633541c62bdc8af1613f";
/// `TPMT_SIGNATURE` of it.
pub(crate) const SIGNATURE_TWO_BANKS: &str = "\
    0018000b0020a5f2cd61bf75d0ade938702a6f6d1db525443eb7cd2927b529eab3f7851fad21002043da0d8430952a90b0bdc9192a6afd\
    88fc1091c99bf068aa6b0a8b6f1e8daea9";
/// A key from the same template in the owner hierarchy.
pub(crate) const OWNER_AK: &str = "\
    0023000b00050472000000100018000b000300100020092966d5011507f2dec6b9a57de7f348d5b260bcb6306281ca9948b4fe077e5400\
    20fc2b042a971709072bbe08282b7fe82a787fddb60da1a44fb756718334c22b07";
/// Its quote, as [`ATTEST`].
pub(crate) const OWNER_ATTEST: &str = "\
    ff54434780180022000b05d23b4789222aef069928e56e35c3c57d0787d87bdc019f571e951677484e1b0020ababababababababababab\
    ababababababababababababababababababababab0000000000000900e45a954a79a659f20113024cd184c1bd5c00000001000b038180\
    0000202ea9ab9198d1638007400cd2c3bef1cc745b864b76011a0e1bc52180ac6452d4";
/// `TPMT_SIGNATURE` of it.
pub(crate) const OWNER_SIGNATURE: &str = "\
    0018000b0020bc0eb42102c9b8b5740c2d5cbe9f1a89619aaff47160732c9b5296aad45311db0020ab4581e44b06ba40bf25332667697b\
    f6f33dafde2c97f2aa294bffabee132355";

/// Its bytes.
pub(crate) fn bytes(vector: &str) -> Vec<u8> {
    hex::decode(vector).unwrap()
}
